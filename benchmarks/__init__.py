"""What is measured, one command each; results are committed under results/."""
