"""Does a trimmed model load in Hugging Face transformers, with the logits that the whole model gives the kept tokens?

transformers and torch live in an environment of their own; its interpreter is named with --torch:

    uv run fisher-jax report && uv run fisher-jax trim --state report --keep 16000
    uv run python experiments/trim_in_transformers.py trimmed --torch PYTHON     # writes results/

Compared are token ids and decoded text of both tokenizers on texts in several scripts, and logits of the trimmed
model in torch with those of the whole model in this library, restricted to the kept tokens. Fails above 1e-4.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
TEXTS = [
    "The river runs past the old mills, where people walk in spring.",
    "for i in range(10):\n\tprint(i ** 2)  # squares\n",
    "Größe, naïve, Ελληνικά, Русский, 漢字, हिन्दी, العربية and 🙂🚀",
    "  spaces   and\r\nlines\n\n\n",
]
IN_TORCH = """
import sys, json, numpy as np, torch, transformers
folder, texts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
found = {"versions": np.array([torch.__version__, transformers.__version__])}
for i, text in enumerate(texts):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found[f"ids{i}"] = np.array(ids)
    found[f"text{i}"] = np.array(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    with torch.no_grad():
        found[f"logits{i}"] = model(torch.tensor([ids])).logits[0].numpy()
prompt = tokenizer(texts[0], return_tensors="pt")["input_ids"]
made = model.generate(prompt, max_new_tokens=20, do_sample=False)
found["generated"] = np.array(tokenizer.decode(made[0, prompt.shape[1]:]))
found["chat"] = np.array(bool(tokenizer.chat_template))
np.savez(out, **found)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what `fisher-jax trim` wrote")
    parser.add_argument("--torch", required=True, help="interpreter of an environment with torch and transformers")
    parser.add_argument("--model", default="smollm2", help="the model that was trimmed")
    parser.add_argument("--no-results", action="store_true", help="print only")
    options = parser.parse_args()
    from fisher_jax import models

    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/torch.npz"
        subprocess.run([options.torch, "-c", IN_TORCH, options.folder, json.dumps(TEXTS), out], check=True)
        there = dict(np.load(out))
    whole, trimmed = models.load(options.model), models.load(options.folder)
    told = json.loads((pathlib.Path(options.folder) / "trim.json").read_text())
    kept = np.array(told["kept_token_ids"])
    largest = 0.0
    for i, text in enumerate(TEXTS):
        ids = trimmed.tokenizer.encode(text, special=False)
        assert there[f"ids{i}"].tolist() == ids, f"token ids differ on {text!r}"
        assert str(there[f"text{i}"]) == text, f"{text!r} comes back as {there[f'text{i}']!r}"
        logits = np.asarray(whole.apply(whole.params, kept[ids].astype(np.int32)[None]))[0][:, kept]
        largest = max(largest, float(np.max(np.abs(logits - there[f"logits{i}"]))))
    size = float(np.abs(logits).max())
    torch, transformers = there["versions"].tolist()
    print(f"torch {torch}, transformers {transformers}: {len(kept):,} tokens, chat template: {bool(there['chat'])}")
    print(f"token ids and texts agree on {len(TEXTS)} texts; logits up to {size:.0f} differ by at most {largest:.1e}")
    print(f"greedy continuation: {there['generated']}")
    result = {"keep": len(kept), "largest_logit_difference": largest, "torch": torch, "transformers": transformers}
    result |= {key: value for key, value in told.items() if key != "kept_token_ids"}
    if not options.no_results:
        (RESULTS / f"trim_in_transformers_{len(kept)}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if largest < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
