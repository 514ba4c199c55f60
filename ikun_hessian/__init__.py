"""The command line: joins ikun and hessian_tools, and does no mathematics of its own."""
