package nixproto

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"nbd/nixproto/nar"
)

func TestContentAddressGolden(t *testing.T) {
	seen := map[string]int{}
	for _, info := range goldenInfos(t) {
		if err := CheckCA(info); err != nil {
			t.Error(err)
		}
		if info.CA == "" {
			continue
		}
		ca, err := ParseContentAddress(info.CA)
		if err != nil || ca.String() != info.CA {
			t.Errorf("%s: %s, %v", info.CA, ca, err)
		}
		self := slices.Contains(info.References, info.Path)
		seen[info.CA[:strings.LastIndexByte(info.CA, ':')]]++
		if self {
			seen["self"]++
		}
		if info.Path.IsDerivation() {
			continue // their archives are the tests of derivations
		}
		archive := readGolden(t, info.Path.Base()+".nar")
		if SumSHA256(archive) != info.NarHash {
			t.Errorf("%s: other archive", info.Path)
		}
		h, err := NewCAHasher(ca.Method, ca.Hash.Algo(), map[bool]StorePath{true: info.Path}[self])
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range archive { // byte by byte
			if _, err := h.Write([]byte{c}); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.Check(ca); err != nil {
			t.Errorf("%s: %v", info.Path, err)
		}
		checkForInfo(t, info, archive)
	}
	for _, kind := range []string{
		"text:sha256", "fixed:md5", "fixed:sha1", "fixed:sha256", "fixed:sha512",
		"fixed:r:md5", "fixed:r:sha1", "fixed:r:sha256", "fixed:r:sha512", "self",
	} {
		if seen[kind] == 0 {
			t.Errorf("no path with %s", kind)
		}
	}
}

// checkForInfo wants CAHasherFor to take the archive, and to refuse another.
func checkForInfo(t *testing.T, info *PathInfo, archive []byte) {
	t.Helper()
	changed := slices.Clone(archive)
	x, _, err := nar.ReadIndex(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	changed[x[0].Offset] ^= 1
	for _, tt := range []struct {
		nar []byte
		ok  bool
	}{{archive, true}, {changed, false}} {
		h, ca, err := CAHasherFor(info)
		if err != nil {
			t.Fatal(err)
		}
		if h == nil {
			return
		}
		if _, err := h.Write(tt.nar); err != nil {
			t.Fatalf("%s: %v", info.Path, err)
		}
		if err := h.Check(ca); (err == nil) != tt.ok || (err != nil && !errors.Is(err, ErrWrongCA)) {
			t.Errorf("%s: %v", info.Path, err)
		}
	}
}

func TestSelfReferenceOfOldNix(t *testing.T) {
	info := &PathInfo{
		Path: StoreDir + "/nr1nv0s2d7br0xlxlh5n16lrbfard1g0-ca-self",
		CA:   "fixed:r:sha256:0h0gxmwcd19jqj5kxcfhz9gl94kzpgwh8snvp3k61y0wfw86nzs7",
	}
	info.References = []StorePath{info.Path}
	archive := readGolden(t, "nix-2.8/"+info.Path.Base()+".nar")
	info.NarHash = SumSHA256(archive)
	if err := CheckCA(info); err != nil {
		t.Error(err)
	}
	checkForInfo(t, info, archive)
}

func TestCheckCARefusesLies(t *testing.T) {
	byName := map[string]*PathInfo{}
	for _, info := range goldenInfos(t) {
		byName[info.Path.Name()] = info
	}
	for name, lie := range map[string]func(p *PathInfo){
		"name":            func(p *PathInfo) { p.Path += "x" },
		"hash part":       func(p *PathInfo) { p.Path = byName["simple"].Path },
		"hash":            func(p *PathInfo) { p.CA = p.CA[:len(p.CA)-1] + "1" },
		"one reference":   func(p *PathInfo) { p.References = append(p.References, byName["simple"].Path) },
		"self reference":  func(p *PathInfo) { p.References = append(p.References, p.Path) },
		"other algorithm": func(p *PathInfo) { p.CA = "fixed:sha1:" + strings.Repeat("0", 32) },
		"other method":    func(p *PathInfo) { p.CA = "fixed:git:sha1:" + strings.Repeat("0", 32) },
		"nonsense":        func(p *PathInfo) { p.CA = "x" },
	} {
		for _, of := range []string{"text", "source", "fixed-flat", "fixed-tree-sha1", "floating-self"} {
			p := *byName[of]
			p.References = slices.Clip(p.References)
			lie(&p)
			p.References = slices.Compact(slices.Sorted(slices.Values(p.References)))
			if slices.Equal(p.References, byName[of].References) && name == "self reference" {
				continue // it refers to itself
			}
			if err := CheckCA(&p); err == nil {
				t.Errorf("%s: %s is taken", of, name)
			} else if name != "nonsense" && name != "hash" && !errors.Is(err, ErrWrongCA) {
				t.Errorf("%s: %s: %v", of, name, err)
			}
		}
	}
	p := *byName["source"]
	p.NarHash = SumSHA256(nil)
	if err := CheckCA(&p); !errors.Is(err, ErrWrongCA) {
		t.Errorf("NAR hash: %v", err)
	}
}

func TestMakePathRefuses(t *testing.T) {
	h := SumSHA256(nil)
	ref := []StorePath{StoreDir + "/" + StorePath(strings.Repeat("0", 32)) + "-x"}
	for name, err := range map[string]error{
		"text with SHA-1":         second(MakeTextPath("x", NewHash(SHA1, make([]byte, 20)), nil)),
		"bad name":                second(MakeTextPath("a/b", h, nil)),
		"no hash":                 second(MakeTextPath("x", Hash{}, nil)),
		"flat with reference":     second(MakeFixedOutputPath(CAFlat, h, "x", ref, false)),
		"flat with itself":        second(MakeFixedOutputPath(CAFlat, h, "x", nil, true)),
		"text with itself":        second(MakeFixedOutputPath(CAText, h, "x", nil, true)),
		"tree of SHA-1 with refs": second(MakeFixedOutputPath(CANAR, NewHash(SHA1, make([]byte, 20)), "x", ref, false)),
		"no method":               second(MakeFixedOutputPath(0, h, "x", nil, false)),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestCAHasherRefuses(t *testing.T) {
	if _, err := NewCAHasher(CAGit, SHA1, ""); !errors.Is(err, ErrUnverifiable) {
		t.Errorf("git: %v", err)
	}
	for _, name := range []string{"executable", "symlink", "empty-directory"} {
		h, err := NewCAHasher(CAFlat, SHA256, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Write(readGolden(t, "../nar/"+name+".nar")); !errors.Is(err, ErrWrongCA) {
			t.Errorf("%s: %v", name, err)
		}
	}
	file := readGolden(t, "../nar/file.nar")
	h, err := NewCAHasher(CAFlat, SHA256, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Write(file[:len(file)-1]); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Sum(); err == nil {
		t.Error("a truncated archive has a content address")
	}
}

func FuzzParseContentAddress(f *testing.F) {
	for _, info := range goldenInfos(f) {
		f.Add(info.CA)
	}
	f.Add("fixed:git:sha1:" + strings.Repeat("0", 32))
	f.Fuzz(func(t *testing.T, s string) {
		ca, err := ParseContentAddress(s)
		if err != nil {
			return
		}
		if again, err := ParseContentAddress(ca.String()); err != nil || again != ca {
			t.Errorf("%q became %q, %v", s, again, err)
		}
		if s == "" {
			return
		}
		if _, err := ca.Path("x", nil, false); err != nil {
			t.Error(err)
		}
		m, a, err := ParseCAMethod(s[:strings.LastIndexByte(s, ':')])
		if err != nil || m != ca.Method || a != ca.Hash.Algo() {
			t.Errorf("%q: method %v, %v, %v", s, m, a, err)
		}
	})
}
