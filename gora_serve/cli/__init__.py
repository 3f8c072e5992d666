"""The command line: options in, one library call, results rendered. No formula and no file format lives here."""
