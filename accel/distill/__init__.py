"""What making any artifact needs: prompts, teachers, lessons on disk, divergences, checkpoints. Knows no method."""
