package reuse

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"nbd/nixproto"
)

func path(n int, name string) nixproto.StorePath {
	return nixproto.StorePath(fmt.Sprintf("%s/%032d-%s", nixproto.StoreDir, n, name))
}

// sampleDrv and sampleClosure are what the golden keys are of.
func sampleDrv() *nixproto.Derivation {
	return &nixproto.Derivation{
		Name:      "hello",
		Outputs:   map[string]nixproto.DerivationOutput{"out": {Path: path(9, "hello")}, "dev": {Path: path(8, "hello-dev")}},
		InputSrcs: []nixproto.StorePath{path(3, "top")},
		System:    "x86_64-linux",
		Builder:   string(path(1, "sh")) + "/bin/sh",
		Args:      []string{"-c", "true"},
		Env:       map[string]string{"name": "hello", "out": string(path(9, "hello"))},
	}
}

func sampleClosure() []*nixproto.PathInfo {
	sh := &nixproto.PathInfo{Path: path(1, "sh"), NarHash: nixproto.SumSHA256([]byte("sh")), NarSize: 120}
	lib := &nixproto.PathInfo{Path: path(2, "lib"), NarHash: nixproto.SumSHA256([]byte("lib")), NarSize: 240, CA: "fixed:md5:x", References: []nixproto.StorePath{path(2, "lib"), sh.Path}}
	top := &nixproto.PathInfo{Path: path(3, "top"), NarHash: nixproto.SumSHA256([]byte("top")), NarSize: 360, References: []nixproto.StorePath{sh.Path, lib.Path}}
	return []*nixproto.PathInfo{sh, lib, top}
}

func mustKey(t *testing.T, drv *nixproto.Derivation, closure []*nixproto.PathInfo) Key {
	t.Helper()
	k, err := NewKey(drv, closure)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// The key of a build must never change by accident: every stored result would
// be lost. When it must change, raise the version in key.go and replace these.
func TestKeyGolden(t *testing.T) {
	none := &nixproto.Derivation{Name: "x", Outputs: map[string]nixproto.DerivationOutput{"out": {HashAlgo: "r:sha256"}}}
	for _, c := range []struct {
		name string
		key  Key
		want string
	}{
		{"closure", mustKey(t, sampleDrv(), sampleClosure()), goldenClosure},
		{"no inputs", mustKey(t, none, nil), goldenNone},
	} {
		if c.key.String() != c.want {
			t.Errorf("%s: key %s, want %s", c.name, c.key, c.want)
		}
		if k, err := ParseKey(c.key.String()); err != nil || k != c.key {
			t.Errorf("%s: parsed again: %v, %v", c.name, k, err)
		}
	}
}

func TestParseKeyRefuses(t *testing.T) {
	for _, s := range []string{"", "00", "zz", strings.Repeat("00", 33), strings.Repeat("xy", 32)} {
		if _, err := ParseKey(s); err == nil {
			t.Errorf("ParseKey(%q) succeeded", s)
		}
	}
}

// A hook names the whole closure as inputs, a .drv file the direct ones.
func TestKeyIgnoresWhichInputsAreNamed(t *testing.T) {
	want := mustKey(t, sampleDrv(), sampleClosure())
	drv := sampleDrv()
	drv.InputSrcs = []nixproto.StorePath{path(1, "sh"), path(2, "lib"), path(3, "top")}
	closure := sampleClosure()
	slices.Reverse(closure)
	slices.Reverse(closure[0].References)
	if got := mustKey(t, drv, closure); got != want {
		t.Errorf("key depends on the spelling of the inputs")
	}
}

// Every field that a builder can see changes the key.
func TestKeyContainsEverything(t *testing.T) {
	for name, change := range map[string]func(*nixproto.Derivation, []*nixproto.PathInfo){
		"name":             func(d *nixproto.Derivation, _ []*nixproto.PathInfo) { d.Name = "hullo" },
		"system":           func(d *nixproto.Derivation, _ []*nixproto.PathInfo) { d.System = "i686-linux" },
		"builder":          func(d *nixproto.Derivation, _ []*nixproto.PathInfo) { d.Builder += "x" },
		"argument":         func(d *nixproto.Derivation, _ []*nixproto.PathInfo) { d.Args[1] = "false" },
		"joined arguments": func(d *nixproto.Derivation, _ []*nixproto.PathInfo) { d.Args = []string{"-ctrue"} },
		"environment":      func(d *nixproto.Derivation, _ []*nixproto.PathInfo) { d.Env["a"] = "b" },
		"value":            func(d *nixproto.Derivation, _ []*nixproto.PathInfo) { d.Env["name"] = "b" },
		"output path": func(d *nixproto.Derivation, _ []*nixproto.PathInfo) {
			d.Outputs["out"] = nixproto.DerivationOutput{Path: path(7, "hello")}
		},
		"output kind": func(d *nixproto.Derivation, _ []*nixproto.PathInfo) {
			d.Outputs["out"] = nixproto.DerivationOutput{HashAlgo: "r:sha256"}
		},
		"output name": func(d *nixproto.Derivation, _ []*nixproto.PathInfo) {
			d.Outputs["doc"] = d.Outputs["dev"]
			delete(d.Outputs, "dev")
		},
		"contents of an input":   func(_ *nixproto.Derivation, c []*nixproto.PathInfo) { c[0].NarHash = c[1].NarHash },
		"size of an input":       func(_ *nixproto.Derivation, c []*nixproto.PathInfo) { c[0].NarSize++ },
		"path of an input":       func(_ *nixproto.Derivation, c []*nixproto.PathInfo) { c[2].Path = path(4, "top") },
		"address of an input":    func(_ *nixproto.Derivation, c []*nixproto.PathInfo) { c[1].CA = "" },
		"self reference":         func(_ *nixproto.Derivation, c []*nixproto.PathInfo) { c[1].References = c[1].References[1:] },
		"edge within a closure":  func(_ *nixproto.Derivation, c []*nixproto.PathInfo) { c[2].References = c[2].References[1:] },
		"edge that adds nothing": func(_ *nixproto.Derivation, c []*nixproto.PathInfo) { c[1].References = c[1].References[:1] },
	} {
		drv, closure := sampleDrv(), sampleClosure()
		change(drv, closure)
		if mustKey(t, drv, closure).String() == goldenClosure {
			t.Errorf("%s is not in the key", name)
		}
	}
}

func TestKeyRefuses(t *testing.T) {
	drv := sampleDrv()
	drv.InputDrvs = map[nixproto.StorePath][]string{path(5, "x.drv"): {"out"}}
	circle := sampleClosure()
	circle[0].References = []nixproto.StorePath{path(3, "top")}
	for name, f := range map[string]func() (Key, error){
		"unresolved": func() (Key, error) { return NewKey(drv, nil) },
		"missing":    func() (Key, error) { return NewKey(sampleDrv(), sampleClosure()[1:]) },
		"twice":      func() (Key, error) { return NewKey(sampleDrv(), append(sampleClosure(), sampleClosure()...)) },
		"circle":     func() (Key, error) { return NewKey(sampleDrv(), circle) },
	} {
		if _, err := f(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// bigClosure is n paths with up to ten references each; chain makes each refer
// to the one before, so that the graph is n deep.
func bigClosure(n int, chain bool) []*nixproto.PathInfo {
	rng := rand.New(rand.NewPCG(1, 2))
	closure := make([]*nixproto.PathInfo, n)
	for i := range closure {
		info := &nixproto.PathInfo{Path: path(i, "p"), NarSize: uint64(i)}
		if chain && i > 0 {
			info.References = append(info.References, path(i-1, "p"))
		}
		for range min(i, 10) {
			info.References = append(info.References, path(rng.IntN(i), "p"))
		}
		closure[i] = info
	}
	return closure
}

func TestKeyOfDeepClosure(t *testing.T) {
	mustKey(t, sampleDrv(), bigClosure(20000, true))
}

func BenchmarkKey5000(b *testing.B) {
	closure := bigClosure(5000, false)
	for b.Loop() {
		if _, err := NewKey(sampleDrv(), closure); err != nil {
			b.Fatal(err)
		}
	}
}

// The golden keys of TestKeyGolden.
const (
	goldenClosure = "bc9e45fa61a9072221e5682bd9b21dbe152928c6271750c9db61f3933fe708a3"
	goldenNone    = "f18dfc3f9b0984d71464b9267df66613eef22cd40a66add45047481997d35cc0"
)

func TestVariant(t *testing.T) {
	k := Key{1, 2, 3}
	a, b := k.Variant("a"), k.Variant("b")
	if a == k || b == k || a == b || a != k.Variant("a") {
		t.Errorf("variants of %s: %s and %s", k, a, b)
	}
	if k != (Key{1, 2, 3}) {
		t.Error("the key was changed")
	}
}
