"""Distillation: losses that follow a teacher, teachers and what they answered, samples without labels."""
