"""What a run tells: the numbers of a step, the files they go to, and what a person sees while it runs."""
