"""Training: healing compressed models, fine-tuning, and students that learn from a teacher."""
