"""Makes a small tokenizer of the format of PaliGemma's, for tests and demos without a download.

    uv run python scripts/make_tokenizer.py --out demo/tokenizer

Like PaliGemma's it is a byte-pair encoding with byte fallback: a space becomes "▁" and belongs to the word behind
it, the newline is a token of its own, <bos> is put in front and no <eos> behind, and any text encodes and decodes
to itself. The first ids are <pad>=0, <eos>=1, <bos>=2, <unk>=3. It is trained on the task descriptions of
Meta-World that LeRobot carries, as written and in lower case, or on the lines of --sentences. The result depends on
nothing else. Load it with `AutoTokenizer.from_pretrained("demo/tokenizer")`.
"""

import argparse
import importlib.util
import json
import string
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"
LARGEST_VOCABULARY = 512


def metaworld_sentences() -> list[str]:
    """The descriptions lie in LeRobot as JSON; importing the module that reads it would need metaworld."""
    lerobot = importlib.util.find_spec("lerobot")
    if lerobot is None or not lerobot.submodule_search_locations:
        raise ValueError("LeRobot is not installed; install it or give a text file with --sentences")
    file = Path(lerobot.submodule_search_locations[0]) / "envs" / "metaworld_config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing from this LeRobot; give a text file with --sentences")
    return sorted(set(json.loads(file.read_text())["TASK_DESCRIPTIONS"].values()))


def pipeline(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Split(Regex(f"{SPACE}?[^{SPACE}\n]+"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def train(sentences: list[str]) -> Tokenizer:
    """Learns the merges, then numbers the tokens anew: special, newline, bytes, learnt."""
    texts = sorted({text for sentence in sentences for text in (sentence, sentence.lower())})
    reserved = SPECIAL_TOKENS + ["\n"] + BYTE_TOKENS
    learner = pipeline(BPE())
    trainer = BpeTrainer(
        vocab_size=LARGEST_VOCABULARY - len(reserved),
        initial_alphabet=[SPACE, *string.ascii_lowercase, *string.digits],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    in_order = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    vocabulary = {token: index for index, token in enumerate(reserved + in_order)}
    if len(vocabulary) > LARGEST_VOCABULARY:
        raise ValueError(
            f"the sentences use {len(vocabulary) - len(reserved)} characters, which does not fit into "
            f"{LARGEST_VOCABULARY} tokens; take fewer alphabets"
        )
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = pipeline(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json and tokenizer_config.json")
    parser.add_argument("--sentences", type=Path, help="text file, a sentence per line; default: those of Meta-World")
    arguments = parser.parse_args()
    try:
        if arguments.sentences is None:
            sentences = metaworld_sentences()
        elif not arguments.sentences.is_file():
            raise ValueError(f"--sentences: {arguments.sentences} is not a file")
        else:
            sentences = [line.strip() for line in arguments.sentences.read_text().splitlines() if line.strip()]
        if not sentences:
            raise ValueError(f"--sentences: {arguments.sentences} holds no sentence")
        tokenizer = train(sentences)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    save(tokenizer, arguments.out)
    lengths = [len(tokenizer.encode(sentence + "\n").ids) for sentence in sentences]
    print(
        f"{arguments.out}: {tokenizer.get_vocab_size()} tokens; {len(sentences)} sentences of "
        f"{min(lengths)} to {max(lengths)} tokens, <bos> and newline included"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
