"""What is wrong with a run or a study, why, and what to run next: evidence, rules, diagnoses."""
