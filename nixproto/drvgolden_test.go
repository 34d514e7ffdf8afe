package nixproto

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// drvDir holds what real Nix made; its README says how.
var drvDir = filepath.Join("..", "testdata", "drv")

func readGolden(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(drvDir, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// goldenDrvs returns the texts of the .drv files by their paths.
func goldenDrvs(t testing.TB) map[StorePath][]byte {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(drvDir, "*.drv"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no derivations: %v", err)
	}
	drvs := map[StorePath][]byte{}
	for _, f := range files {
		drvs[basePath(t, filepath.Base(f))] = readGolden(t, filepath.Base(f))
	}
	return drvs
}

// lookupIn returns a lookup function for Modulo.
func lookupIn(t testing.TB, drvs map[StorePath][]byte) func(StorePath) (*Derivation, error) {
	return func(p StorePath) (*Derivation, error) {
		text, ok := drvs[p]
		if !ok {
			t.Fatalf("no %s", p)
		}
		return ParseDerivation(strings.TrimSuffix(p.Name(), DerivationSuffix), text)
	}
}

// namedDrv returns the path and derivation of an attribute of default.nix.
func namedDrv(t testing.TB, attr string) (StorePath, *Derivation) {
	t.Helper()
	for line := range strings.Lines(string(readGolden(t, "drvs"))) {
		name, path, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name == attr {
			d, err := lookupIn(t, goldenDrvs(t))(storePath(t, path))
			if err != nil {
				t.Fatal(err)
			}
			return storePath(t, path), d
		}
	}
	t.Fatalf("no derivation %s", attr)
	return "", nil
}

// goldenRealisations returns the lines of that file.
func goldenRealisations(t testing.TB) [][]byte {
	t.Helper()
	var lines [][]byte
	s := bufio.NewScanner(bytes.NewReader(readGolden(t, "realisations")))
	for s.Scan() {
		lines = append(lines, bytes.Clone(s.Bytes()))
	}
	if len(lines) == 0 {
		t.Fatal("no realisations")
	}
	return lines
}

// goldenInfos returns the path information of the store.
func goldenInfos(t testing.TB) []*PathInfo {
	t.Helper()
	var infos map[string]struct {
		CA, Deriver string
		NarHash     Hash
		NarSize     uint64
		References  []StorePath
		Signatures  []string
	}
	if err := json.Unmarshal(readGolden(t, "infos.json"), &infos); err != nil {
		t.Fatal(err)
	}
	var all []*PathInfo
	for path, i := range infos {
		all = append(all, &PathInfo{
			Path: storePath(t, path), Deriver: StorePath(i.Deriver), CA: i.CA,
			NarHash: i.NarHash, NarSize: i.NarSize, References: i.References, Signatures: i.Signatures,
		})
	}
	return all
}

func storePath(t testing.TB, s string) StorePath {
	t.Helper()
	p, err := ParseStorePath(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func basePath(t testing.TB, s string) StorePath {
	t.Helper()
	p, err := ParseBaseName(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
