package nixproto

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func goldenNarInfos(t testing.TB) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(drvDir, "*.narinfo"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no narinfo: %v", err)
	}
	texts := map[string][]byte{}
	for _, f := range files {
		texts[filepath.Base(f)] = readGolden(t, filepath.Base(f))
	}
	return texts
}

func TestNarInfoGolden(t *testing.T) {
	infos := map[StorePath]*PathInfo{}
	for _, info := range goldenInfos(t) {
		infos[info.Path] = info
	}
	_, key := goldenKeys(t)
	for name, text := range goldenNarInfos(t) {
		n, err := ParseNarInfo(text)
		if err != nil {
			t.Fatal(err)
		}
		got, err := n.AppendText(nil)
		if err != nil || string(got) != string(text) {
			t.Errorf("%s: %v\n%s\nwant\n%s", name, err, got, text)
		}
		if d := cmp.Diff(infos[n.Path], &n.PathInfo, cmpopts.EquateComparable(Hash{}), cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if keys, err := n.CheckSignatures([]PublicKey{key}); err != nil || len(keys) != 1 {
			t.Errorf("%s: %v, %v", name, keys, err)
		}
		if n.Compression != "xz" || n.FileSize == 0 || !strings.Contains(n.URL, n.FileHash.Base32()) {
			t.Errorf("%s: %+v", name, n)
		}
	}
}

func TestParseNarInfoMalformed(t *testing.T) {
	text := string(goldenNarInfos(t)["floatingSelf.narinfo"])
	if _, err := ParseNarInfo([]byte(text + "Unknown: x\nUnknown: y\n")); err != nil {
		t.Errorf("unknown fields: %v", err)
	}
	replaced := func(key, value string) string {
		lines := strings.SplitAfter(text, "\n")
		i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, key+": ") })
		lines[i] = value
		return strings.Join(lines, "")
	}
	for _, s := range []string{
		"", "\n", strings.TrimSuffix(text, "\n"), text + text, text + "x\n", text + "Key:value\n",
		replaced("StorePath", ""), replaced("StorePath", "StorePath: x\n"), replaced("URL", ""), replaced("URL", "URL: \n"),
		replaced("NarHash", ""), replaced("NarHash", "NarHash: sha1:"+strings.Repeat("0", 40)+"\n"),
		replaced("NarSize", ""), replaced("NarSize", "NarSize: 0\n"), replaced("NarSize", "NarSize: -1\n"),
		replaced("NarSize", "NarSize: 18446744073709551616\n"), replaced("FileSize", "FileSize: x\n"),
		replaced("FileHash", "FileHash: x\n"), replaced("References", "References: x\n"), replaced("Deriver", "Deriver: x\n"),
		replaced("Sig", "Sig: x\n"), replaced("CA", "CA: x\n"), strings.Repeat(" ", maxNarInfo+1),
	} {
		if n, err := ParseNarInfo([]byte(s)); err == nil {
			t.Errorf("%q: %+v", s, n)
		}
	}
	n, err := ParseNarInfo([]byte(replaced("Deriver", "Deriver: unknown-deriver\n")))
	if err != nil || n.Deriver != "" {
		t.Errorf("unknown deriver: %v", err)
	}
	if n, err = ParseNarInfo([]byte(replaced("Compression", ""))); err != nil || n.Compression != "bzip2" {
		t.Errorf("no compression: %v", err)
	}
}

func FuzzParseNarInfo(f *testing.F) {
	for _, text := range goldenNarInfos(f) {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := ParseNarInfo(b)
		if err != nil {
			return
		}
		text, err := n.AppendText(nil)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseNarInfo(text)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if d := cmp.Diff(n, again, cmpopts.EquateComparable(Hash{})); d != "" {
			t.Error(d)
		}
	})
}
