"""The system on Ray: deployed, found by its parts, watched, and shut down in order."""
