"""The system on Ray Serve: checked before it starts, deployed, and shut down in order; one deployment for each part."""
