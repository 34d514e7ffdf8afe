package nixproto

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const cacheDir = "../testdata/cache"

func TestCacheInfoGolden(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(cacheDir, "xz", "nix-cache-info"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := ParseCacheInfo(text)
	if err != nil || *c != (CacheInfo{StoreDir: StoreDir, Priority: DefaultCachePriority}) {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestParseCacheInfo(t *testing.T) {
	for text, want := range map[string]CacheInfo{
		"": {Priority: DefaultCachePriority},
		"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n": {"/nix/store", true, 40},
		"Priority:-3\r\nX: y\nStoreDir: /gnu/store":              {"/gnu/store", false, -3},
		"<html>\nnothing": {Priority: DefaultCachePriority},
	} {
		c, err := ParseCacheInfo([]byte(text))
		if err != nil || *c != want {
			t.Errorf("%q: %+v, %v", text, c, err)
		}
	}
	for _, text := range []string{"StoreDir: x", "StoreDir:\n", "StoreDir: /a\x00b\n", "Priority: x\n", "Priority: 99999999999\n", strings.Repeat(" ", maxCacheInfo+1)} {
		if c, err := ParseCacheInfo([]byte(text)); err == nil {
			t.Errorf("%.20q: %+v", text, c)
		}
	}
}

func FuzzParseCacheInfo(f *testing.F) {
	f.Add([]byte("StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseCacheInfo(b)
		if err != nil {
			return
		}
		text, err := c.AppendText(nil)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseCacheInfo(text); err != nil || *again != *c {
			t.Errorf("%q: %+v, %v", text, again, err)
		}
	})
}

// Narinfos as real Nix writes them, in each compression.
func TestNarInfoCaches(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(cacheDir, "key.public"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ParsePublicKey(string(text))
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(cacheDir, "*", "*.narinfo"))
	if err != nil || len(files) != 18 {
		t.Fatalf("%d narinfos, %v", len(files), err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n, err := ParseNarInfo(text)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if b, err := n.AppendText(nil); err != nil || string(b) != string(text) {
			t.Errorf("%s: %v\n%s", file, err, b)
		}
		if keys, err := n.CheckSignatures([]PublicKey{key}); err != nil || len(keys) != 1 {
			t.Errorf("%s: %v, %v", file, keys, err)
		}
		if n.Compression != filepath.Base(filepath.Dir(file)) || n.CA != "" && CheckCA(&n.PathInfo) != nil {
			t.Errorf("%s: %+v", file, n)
		}
	}
}
