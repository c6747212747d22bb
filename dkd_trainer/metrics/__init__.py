"""How far pictures of a student are from the teacher's, and whether they show their prompts."""
