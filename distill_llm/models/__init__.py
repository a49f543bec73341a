"""Models found, opened, loaded and converted; what is recorded of their forward pass.

May import: common, architectures, losses, data.
"""
