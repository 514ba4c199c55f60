"""What is known of each library: its layers, its state and its files."""
