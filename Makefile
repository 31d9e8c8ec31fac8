# What the README runs. Every target sets itself up; each needs Rust and a C compiler, some need Python 3 with pip.

BON    := cargo run --locked --release --quiet --
KIT    := target/gpu-kit
PARITY := .cache/parity
DEMO   := runs/demo

.DELETE_ON_ERROR:
.PHONY: help demo test browser gemma humaneval parity paper moments peers memory vm-gemma bench nvcc gpu-kit goldens rust kernels-for-gpu

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: rust kernels-for-gpu gemma ## Train Gemma 3 270M for Best-of-N on this machine, on its GPU if it has one; goes on where an earlier call was stopped
	cargo build --locked --release
	@if [ -e $(DEMO)/comparison.txt ]; then \
		cat $(DEMO)/comparison.txt; \
		echo "$(DEMO) holds this finished run; to start anew: rm -r $(DEMO) && make demo"; \
	elif [ -e $(DEMO)/config.toml ]; then \
		$(BON) train examples/demo/config.toml --resume; \
	else \
		$(BON) train examples/demo/config.toml; \
	fi

test: rust nvcc humaneval ## Check formatting, lints, tests and documentation; what CI runs
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 \
		|| rustup component add rustfmt clippy
	cargo fmt --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps
	cargo test --locked --workspace
	@if tools/find-browser.sh >/dev/null; then $(MAKE) --no-print-directory browser; else \
		echo "NOT TESTED: how reports look in a browser, because there is no Chromium here; install one" \
			"(Debian, Ubuntu: apt install chromium) and run make browser" >&2; fi

browser: rust ## Look at reports in Chromium: plots, labels, contrast, keyboard, hostile text; pages and screenshots stay in target/tmp/pages
	cargo test --locked --test browser -- --nocapture

gemma: ## Fetch Gemma 3 270M into .cache/gemma-3-270m (260 MB to download, once)
	python3 tools/fetch_gemma.py

humaneval: ## Fetch HumanEval into .cache/humaneval, as tasks for the `program` verifier (52 kB to download, once)
	@python3 tools/humaneval.py

parity: rust gemma $(PARITY)/reference.jsonl ## Compare log-probs with Transformers' on real prompts, in f32 and bf16
	cargo build --locked --release
	$(BON) logprobs --model .cache/gemma-3-270m --dtype f32 \
		--input $(PARITY)/reference.jsonl --output $(PARITY)/engine.jsonl
	python3 tools/reference/parity.py --compare $(PARITY)/engine.jsonl
	$(BON) logprobs --model .cache/gemma-3-270m --dtype bf16 \
		--input $(PARITY)/reference.jsonl --output $(PARITY)/engine_bf16.jsonl
	python3 tools/reference/parity.py --compare $(PARITY)/engine_bf16.jsonl --bf16

# Made once: it needs PyTorch and Transformers (up to 3 GB to download).
$(PARITY)/reference.jsonl: | gemma
	python3 tools/reference/parity.py

paper: rust kernels-for-gpu gemma ## Compare the paper's methods on two tasks, several seeds each: hours; runs what examples/paper/results lacks
	cargo build --locked --release
	python3 tools/paper.py run

moments: rust kernels-for-gpu gemma ## Compare loss curves with 8-bit moments and without masters, three seeds each: up to eight minutes a run; runs what is missing in examples/moments
	cargo build --locked --release
	python3 tools/moments.py run

peers: rust gemma ## Time llama.cpp, Transformers and vLLM at the same work on this CPU (5 GB to download and a build, once; then half an hour)
	cargo build --locked --release
	python3 tools/peers/peers.py

memory: rust gemma ## Train Gemma 3 270M for a step in each mode, and compare the memory that it takes with its plan (minutes)
	cargo test --locked --test gemma_memory -- --nocapture

vm-gemma: rust nvcc gemma ## Sample from Gemma 3 270M and differentiate it on the virtual GPU, and compare with the CPU (minutes)
	cargo test --locked --test vm_gemma -- --nocapture

bench: rust nvcc ## Time the CPU ops, the virtual GPU, the CUDA kernels (without a GPU their bounds from counts) and the engine on them
	cargo bench --locked --workspace

nvcc: ## Find nvcc, or fetch NVIDIA's compiler into .cache (120 MB to download, once)
	@tools/install-nvcc.sh >/dev/null

gpu-kit: rust nvcc ## Pack what tells all of a GPU on a machine with a driver alone (target/gpu-kit.tar.xz)
	tools/gpu_kit/make.sh $(KIT)
	tar -C $(dir $(KIT)) --owner=0 --group=0 -cf - $(notdir $(KIT)) | xz -T0 -9 >$(KIT).tar.xz
	@bytes=$$(stat -c %s $(KIT).tar.xz); echo "$(KIT).tar.xz: $$((bytes >> 10)) KiB"; \
		[ $$bytes -le 41943040 ] || { echo "more than 40 MiB: what has grown in $(KIT)?" >&2; exit 1; }

goldens: ## Rewrite tests/goldens with Transformers (up to 3 GB to download, once)
	python3 tools/reference/goldens.py
	python3 tools/reference/chat.py
	python3 tools/reference/blockwise.py

# Where there is a driver to run kernels, the build that follows has them. Without nvcc it is one for the CPU.
kernels-for-gpu:
	@! tools/has-driver.sh || tools/install-nvcc.sh >/dev/null \
		|| echo "this machine has a CUDA driver, but no nvcc for the kernels (see above): computing on the CPU" >&2

rust:
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust 1.89 or newer, see rustup.rs" >&2; exit 1; }
