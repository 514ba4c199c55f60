"""Write saved results as one self-contained HTML file."""
