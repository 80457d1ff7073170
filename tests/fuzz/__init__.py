"""Random calls of every public function, checked against float64 and against what each function promises.

`inputs` describes arguments, `strategies` draws them, `functions` lists what is called and how exact it must be,
`checks` judges one call, `run` makes many of them in processes of their own, and `known` lists the faults that are not
mended yet.
"""
