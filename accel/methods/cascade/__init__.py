"""Cascades: a cheap student shown a teacher's demonstrations, and the teacher for what its samples disagree on."""
