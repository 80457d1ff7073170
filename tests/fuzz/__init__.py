"""Random calls of every public function, checked against float64 and against what each function promises.

`inputs` describes arguments, `strategies` draws them, `functions` lists what is called and how exact it must be,
`checks` checks one call, `run` makes many of them in separate processes, and `known` lists the faults that are not
fixed yet.
"""
