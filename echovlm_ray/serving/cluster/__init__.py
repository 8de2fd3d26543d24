"""The system on Ray: deployment, discovery of replicas, health, and orderly shutdown."""
