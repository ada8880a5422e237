"""A YAML file of options: plain data, each value checked as on the command line."""

import re
from argparse import ArgumentTypeError
from pathlib import Path

from utils.errors import InputError
from utils.files import neighbours
from utils.option_types import nearest

SWITCH = {"yes": True, "on": True, "no": False, "off": False}  # besides true and false
DERIVED = ("training", "distributed")  # a run's configs.yaml holds these too; no flag of theirs exists


def plain_loader():
    """yaml.SafeLoader for options: plain data, words as words, nothing twice. The published files'
    `!!python/tuple` reads as a list."""
    import yaml

    class Loader(yaml.SafeLoader):
        # of YAML 1.1's booleans only true and false: off, no and on are words here, as on the command line
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value]
            for (key, _), name in zip(node.value, keys, strict=True):
                if keys.count(name) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name} stands there twice", key.start_mark
                    )
            return super().construct_mapping(node, deep)

        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):  # a kilobyte of them can stand for gigabytes
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "an alias (*name) is no option", mark)
            return super().compose_node(parent, index)

    Loader.add_constructor(
        "tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node, deep=True)
    )
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    # YAML 1.1 reads 1e-5 as a string; people write it
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    return Loader


def run_file(path):
    """The file that --config_file names: itself, or the configs.yaml of a run's folder."""
    path = Path(path)
    return path / "configs.yaml" if path.is_dir() else path


def read_yaml(path):
    """A mapping from a YAML file of plain data; see run_file."""
    import yaml

    path = run_file(path)
    try:
        options = yaml.load(path.read_text(encoding="utf-8-sig"), plain_loader())
    except FileNotFoundError:
        raise InputError(f"no config file at {path}{neighbours(path, (path.suffix,))}") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"{path} cannot be read: {why}") from None
    except yaml.YAMLError as error:
        at = getattr(error, "problem_mark", None)
        where = f", line {at.line + 1}" if at else ""
        problem = getattr(error, "problem", None) or "it does not parse"
        raise InputError(f"{path}{where} is not a YAML file of plain options: {problem}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of `2023-13-45`, `!!bool x`
        raise InputError(f"{path} holds a value that is no plain option: {error}") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be a file of options") from None
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise InputError(f"{path} is not a file of options: it must hold lines like `batch_size: 64`")
    return options


def read_options(path, parser, forgive=None):
    """The options of a config file as the command line would give them; an error names key and file.

    forgive: asked with the key and value of what would be an error; if it says yes, they are passed over.
    """
    actions, options = parser.options(), {}
    for key, value in read_yaml(path).items():
        if key in DERIVED:
            continue
        if key not in actions:
            if forgive and forgive(key, value):
                continue
            raise InputError(f"{path}: unknown option {key}{nearest(key, actions)}")
        try:
            options[key] = _check_value(actions[key], value)
        except ArgumentTypeError as error:
            if not (forgive and forgive(key, value)):
                raise InputError(f"{path}: {key}: {error}") from None
    return options


def _check_value(action, value):
    if action.nargs == 0:  # a switch
        value = SWITCH.get(str(value).lower(), value)
        if not isinstance(value, bool):
            raise ArgumentTypeError(f'"{value}" is neither true nor false')
        return value
    if value is None and action.default is None:
        return None
    if action.dest == "clip_architecture":
        if not isinstance(value, dict):
            raise ArgumentTypeError("must be a mapping such as {vision_width: 128}")
        return dict(action.type(f"{name}={size}") for name, size in value.items())
    if action.nargs is None:
        if isinstance(value, (list, dict)) or value is None:
            raise ArgumentTypeError(f'"{value}" is not a single value')
        if isinstance(value, bool):
            raise ArgumentTypeError(f'{str(value).lower()} is no word: "{str(value).lower()}" in quotes is')
        return action.type(value) if action.type else str(value)  # `name: 7`
    if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
        wanted = f"{action.nargs} values" if isinstance(action.nargs, int) else "values"
        raise ArgumentTypeError(f'"{value}" is not a list of {wanted}')
    return [action.type(item) for item in value]
