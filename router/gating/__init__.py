"""Gates: which organs serve a request, and which experts a token goes to."""
