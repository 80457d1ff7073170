"""guided = cond + omega (cond - uncond), one omega for each sample. The pattern room: start reading here."""
