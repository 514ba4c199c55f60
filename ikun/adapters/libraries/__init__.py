"""What is known of each library: its layers, its neurons as nodes, and its files."""
