import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from common import KEY, SCHEMA, SHAPED, TEXT, URL, settled, shaped

home = Path(tempfile.mkdtemp())
rows = [
    f"- model_id: g-{name}\n  model_name: {name}\n  api_base: {URL}/v1\n  api_key_name: galley\n"
    "  supports_schema: true\n  supports_tools: true\n"
    for name in ("fake-1b", "nope", "slow", "toolish", "toolish-once", SHAPED)
]
(home / "extra-openai-models.yaml").write_text("".join(rows))
env = os.environ | {"LLM_USER_PATH": str(home)}
llm = str(Path(sys.executable).with_name("llm"))


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [llm, *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        stdin=subprocess.DEVNULL,
    )


done = ask("-m", "g-fake-1b", "--key", KEY, "hi")
assert done.stdout.strip() == TEXT, done
done = ask("-m", "g-fake-1b", "--no-stream", "--key", KEY, "hi")
assert done.stdout.strip() == TEXT, done
done = ask("-m", f"g-{SHAPED}", "--key", KEY, "--schema", json.dumps(SCHEMA), "hi")
assert done.returncode == 0, done
shaped(json.loads(done.stdout))
double = "def f(x: int) -> int:\n    'Doubles x.'\n    return 2 * x\n"
done = ask("-m", "g-toolish-once", "--key", KEY, "--functions", double, "--td", "hi")
assert done.returncode == 0 and "f({'x': 1})" in done.stderr and "2" in done.stderr, done
assert "The tool said so" in done.stdout, done
done = ask("-m", "g-nope", "--key", KEY, "hi")
assert done.returncode and "does not exist here" in done.stderr, done
done = ask("-m", "g-fake-1b", "--key", "sk-wrong", "hi")
assert done.returncode and "API key" in done.stderr, done
child = subprocess.Popen(
    [llm, "-m", "g-slow", "--key", KEY, "hi"], env=env, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
)
child.stdout.read(2)
child.send_signal(signal.SIGINT)
child.wait(20)
settled("slow", "disconnected")
