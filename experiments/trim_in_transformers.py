"""Does a trimmed model load in Hugging Face transformers, with the logits that the whole model gives the kept tokens?

transformers and torch live in an environment of their own; its interpreter is named with --torch:

    uv run fisher-jax report && uv run fisher-jax trim --state report --keep 16000
    uv run python experiments/trim_in_transformers.py trimmed --torch PYTHON     # writes results/

Compared are token ids and decoded text of both tokenizers on texts in several scripts, and in torch the logits of the
trimmed model with those of the whole model, restricted to the kept tokens; fails above 1e-4. Told beside it: how far
float32 logits of torch are from those of this library, relative to the largest.
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
folder, whole, texts, out = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
load = transformers.AutoModelForCausalLM.from_pretrained
model, whole = (load(f, dtype=torch.float32, attn_implementation="eager") for f in (folder, whole))
kept = torch.tensor(json.load(open(folder + "/trim.json"))["kept_token_ids"])
found = {"versions": np.array([torch.__version__, transformers.__version__])}
for i, text in enumerate(texts):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found[f"ids{i}"] = np.array(ids)
    found[f"text{i}"] = np.array(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    with torch.no_grad():
        found[f"logits{i}"] = model(torch.tensor([ids])).logits[0].numpy()
        found[f"whole{i}"] = whole(kept[torch.tensor([ids])]).logits[0][:, kept].numpy()
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

    whole, trimmed = models.load(options.model), models.load(options.folder)
    with tempfile.TemporaryDirectory() as scratch:
        out, folder = f"{scratch}/torch.npz", pathlib.Path(scratch, "whole")
        models.save(folder, whole.config, whole.params, whole.tokenizer)
        arguments = [options.folder, str(folder), json.dumps(TEXTS), out]
        subprocess.run([options.torch, "-c", IN_TORCH, *arguments], check=True)
        there = dict(np.load(out))
    told = json.loads((pathlib.Path(options.folder) / "trim.json").read_text())
    kept = np.array(told["kept_token_ids"])
    largest, between, size = 0.0, 0.0, 0.0
    for i, text in enumerate(TEXTS):
        ids = trimmed.tokenizer.encode(text, special=False)
        assert there[f"ids{i}"].tolist() == ids, f"token ids differ on {text!r}"
        assert str(there[f"text{i}"]) == text, f"{text!r} comes back as {there[f'text{i}']!r}"
        logits = np.asarray(trimmed.apply(trimmed.params, np.array([ids], np.int32)))[0]
        size = max(size, float(np.abs(logits).max()))
        between = max(between, float(np.max(np.abs(logits - there[f"logits{i}"]))))
        largest = max(largest, float(np.max(np.abs(there[f"whole{i}"] - there[f"logits{i}"]))))
    torch, transformers = there["versions"].tolist()
    print(f"torch {torch}, transformers {transformers}: {len(kept):,} tokens, chat template: {bool(there['chat'])}")
    print(f"token ids and texts agree on {len(TEXTS)} texts; logits are within {largest:.1e} of the whole model's")
    print(f"between torch and this library, both float32: {between:.1e}, {between / size:.1e} of the largest logit")
    print(f"greedy continuation: {there['generated']}")
    result = {
        "keep": len(kept),
        "largest_logit_difference_in_torch": largest,
        "between_frameworks": between / size,
        "torch": torch,
        "transformers": transformers,
    }
    result |= {key: value for key, value in told.items() if key != "kept_token_ids"}
    if not options.no_results:
        (RESULTS / f"trim_in_transformers_{len(kept)}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if largest < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
