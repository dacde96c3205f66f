"""How demonstrations are made: a teacher works on tasks, and what succeeds is kept."""
