"""What runs where: Ray and its sessions, the addresses of all parts, their metrics and state."""
