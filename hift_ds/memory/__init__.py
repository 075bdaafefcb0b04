"""Memory by role."""
