"""Apache Kafka's archives, fetched once from Maven Central with `mvn`.

Owns where they lie and what is asked for; must not know how they are run.
`python -m deploy.kafka_archives` fetches them and says whether that worked.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "4.1.1"
CACHE = Path(__file__).parents[1] / ".cache"
FETCH_SECONDS = 600.0
POM = f"""\
<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>local</groupId><artifactId>kafka</artifactId><version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
      <version>{VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"""


class KafkaUnavailableError(RuntimeError):
    """There is no java or mvn, or the archives could not be fetched."""


def fetch_archives(cache: Path = CACHE) -> Path:
    """The folder of Kafka's archives; fetches them the first time.

    Raises KafkaUnavailableError.
    """
    folder = cache / f"kafka-{VERSION}"
    for tool in ("java", "mvn"):
        if shutil.which(tool) is None:
            raise KafkaUnavailableError(f"{tool} is not installed")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        pom, jars = Path(temporary, "pom.xml"), Path(temporary, "jars")
        pom.write_text(POM)
        goals = ["dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
        command = [
            "mvn",
            "-q",
            "-B",
            "-Dstyle.color=never",
            "-f",
            str(pom),
            *goals,
            "-DincludeScope=runtime",
        ]
        try:
            subprocess.run(command, check=True, timeout=FETCH_SECONDS, stdin=subprocess.DEVNULL)
        except (subprocess.SubprocessError, OSError) as error:
            raise KafkaUnavailableError(f"the archives could not be fetched: {error}") from None
        if not folder.is_dir():  # another process may have been quicker
            jars.rename(folder)
    return folder


def main() -> int:
    """Fetch the archives; 0 when they are there."""
    try:
        print(fetch_archives())
    except KafkaUnavailableError as error:
        print(f"no Apache Kafka: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
