"""What every room needs and no room owns: errors and their one-line form, files written whole, processes, progress bars.

May import: nothing of the package.
"""
