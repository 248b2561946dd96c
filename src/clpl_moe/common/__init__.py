"""What every room needs: options, errors, files, the machine."""
