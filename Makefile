# The verbs. Each does all its set-up in a virtual environment of its own, .venv; CI calls the same ones.
PYTHON ?= python3
VENV ?= .venv
GPU_PYTHON ?= python3
RUN = $(VENV)/bin/python
SOURCES = $(wildcard csrc/*/* python/*.h python/*.cpp python/cuda/*)
FORMATTED = $(SOURCES) $(wildcard tests/cuda/*.* tests/cuda/include/* tests/new_op/csrc/*/* tests/new_op/python/*)

# Python itself is not built with the sanitizers, so their libraries have to be preloaded.
SANITIZED = env LD_PRELOAD="$(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 LGD_REQUIRE_EXT=1 \
	TORCHINDUCTOR_CACHE_DIR=$(abspath build/sanitize/inductor)
SANITIZED_TESTS = $(wildcard $(foreach op,combine combine_moments dynamic_threshold energy_mmd energy_mmd_autograd \
	energy_mmd_pieces guided_energy guided_energy_autograd guided_energy_curve guided_energy_safety guided_score \
	guided_step guided_step_autograd log_prob metrics moments moments_centred omega_table philox rescale rule_program \
	rules solvers step_plan,\
	tests/test_$(op).py)) -n auto --maxprocesses 4
SANITIZED_CALLS = 10000
QUICK = $(filter-out $(foreach part,aot benchmarks builds comfyui% compiled_loop diffusers% digits energy_mmd_pieces fuzz gpu% \
	instruction_sets interpreter interrupt k_diffusion% large learn% mixture notebook peers readme studies trainer%,\
	tests/test_$(part).py),$(wildcard tests/test_*.py))

.PHONY: demo quick test slow fuzz sanitize cuda-check bench peers gpu ptx aot aot-matrix docs wheel lint format install

demo: install            # learn guidance weights on real data; the report lands in runs/digits (ARGS="--seeds 1")
	$(RUN) -m examples.digits $(ARGS)

test: install            # every test; a missing extension is a failure here, not a skip
	LGD_REQUIRE_EXT=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 $(ARGS)

quick: install           # in under 3 minutes on 2 cores: no compilers, interpreter, processes, builds, demos or long training
	LGD_REQUIRE_EXT=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 -k "not compile" $(or $(ARGS),$(QUICK))

slow: install            # the tests that take minutes: those of every op, with older instruction sets
	LGD_REQUIRE_EXT=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow -n auto --maxprocesses 8 $(ARGS)

fuzz: install            # 100,000 random calls of the public functions, against float64 (ARGS="--calls 2000 --seed 1 --jobs 1")
	PYTHONPATH=.:tests $(RUN) -m fuzz.run $(ARGS)

sanitize: install        # tests of C++ and the fuzzer with AddressSanitizer and UBSan, in a copy of the tree (gcc on Linux)
	mkdir -p build/sanitize
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --update --preserve=timestamps -t build/sanitize
	cd build/sanitize && LGD_SANITIZE=1 LGD_REQUIRE_EXT=1 NVCC=none $(abspath $(RUN)) setup.py -q build_ext --inplace
	cd build/sanitize && $(SANITIZED) $(abspath $(RUN)) -m pytest -p no:cacheprovider $(or $(ARGS),$(SANITIZED_TESTS))
	cd build/sanitize && $(SANITIZED) PYTHONPATH=.:tests $(abspath $(RUN)) -m fuzz.run --calls $(SANITIZED_CALLS) --timeout 3600

cuda-check: install      # CUDA kernels on the CPU under ASan, UBSan and TSan, and faults that must be found (ARGS="--faults barrier")
	$(RUN) tests/cuda_check.py $(ARGS)

bench: install           # verify, then time, against eager and compiled PyTorch (ARGS="guided_step --quick"; --help lists all)
	$(RUN) -m benchmarks $(ARGS)

peers: install           # every op beside diffusers, geomloss and KeOps: table, pictures and JSON in runs/peers
	$(RUN) -m pip install --quiet -c constraints.txt diffusers geomloss pykeops matplotlib
	$(RUN) -m benchmarks --peers --json runs/peers/run.json --plot runs/peers --markdown $(ARGS)

gpu:                     # on a machine with a GPU, in the Python that is there: build, tests, benchmarks, one JSON (PHASES=c,d)
	$(GPU_PYTHON) -m benchmarks.gpu $(if $(PHASES),--phases $(PHASES)) $(ARGS)

ptx: install             # the tests of the CUDA kernels on what nvcc makes of them: PTX, run on the CPU (needs nvcc)
	LGD_REQUIRE_EXT=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -m "slow or not slow" tests/test_ptx.py $(ARGS)

aot: install             # what the GPU kernels compile to: registers, spills and load widths, without a GPU
	$(RUN) tests/aot.py

aot-matrix:              # that table and its tests under the oldest Triton of a torch that we run on, and under this one
	$(MAKE) aot test ARGS=tests/test_aot.py VENV=.venv-triton-3.6 TRITON=3.6.0
	$(MAKE) aot test ARGS=tests/test_aot.py

docs: install            # README, docs/ and a page for each op, from its docstrings, as a site: build/site/index.html
	@mkdir -p build
	@# Without --quiet, which would hide warnings from --strict too; the log is printed only if the build fails.
	$(VENV)/bin/mkdocs build --strict >build/docs.log 2>&1 || { cat build/docs.log; exit 1; }

# auditwheel copies the libraries that a wheel needs into it, and tags it with the oldest glibc that it runs on. libgomp is
# left out: torch has loaded one before the extension is imported, and a second one would have threads of its own.
wheel: install           # for a package index: a manylinux wheel for this Python, and the sources, in dist/
	rm -rf build/wheel
	$(RUN) -m build --outdir build/wheel .
	PATH="$(abspath $(VENV)/bin):$$PATH" $(RUN) -m auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist/

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

install: $(VENV)/installed

# Editable, so only a change of what is compiled or required builds again.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	LGD_REQUIRE_EXT=1 $(RUN) -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(if $(TRITON),$(RUN) -m pip install --quiet --no-deps triton==$(TRITON))
	touch $@
