"""The command line: `echoray`."""
