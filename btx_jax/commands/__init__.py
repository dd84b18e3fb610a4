"""The commands of the command line, a module each; pictures and table are shared by some."""
