"""guided = cond + omega (cond - uncond), one omega for each sample. The shortest op: start reading here."""
