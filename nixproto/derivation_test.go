package nixproto

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDerivationGolden(t *testing.T) {
	drvs := goldenDrvs(t)
	lookup := lookupIn(t, drvs)
	m := NewModulo(lookup)
	kinds := map[DerivationKind]int{}
	for path, text := range drvs {
		d, err := lookup(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := d.ATerm(); !bytes.Equal(got, text) {
			t.Errorf("%s: printed\n%s\nwant\n%s", path, got, text)
		}
		if got, err := d.DrvPath(); err != nil || got != path {
			t.Errorf("%s: DrvPath = %s, %v", path, got, err)
		}
		kind, err := d.Kind()
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		kinds[kind]++
		if err := m.Check(d); err != nil {
			t.Error(err)
		}
		paths, ok, err := m.OutputPaths(d)
		if want := kind == InputAddressed || kind == FixedOutput; err != nil || ok != want {
			t.Errorf("%s: OutputPaths = %v, %v, %v", path, paths, ok, err)
		}
	}
	for kind := InputAddressed; kind <= Impure; kind++ {
		if kinds[kind] == 0 {
			t.Errorf("no %v derivation", kind)
		}
	}
}

func TestDerivationFields(t *testing.T) {
	_, d := namedDrv(t, "odd")
	for name, want := range map[string]string{
		"tab": "a\tb", "newline": "a\nb", "return": "a\rb", "quote": `a"b`, "backslash": `a\b\n`,
		"dollar": "${x}", "utf8": "日本 ümläut", "empty": "", `a"key`: "x", "yes": "1", "number": "3",
		"control": "\x01\x7f",
	} {
		if got, ok := d.Env[name]; !ok || got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	path, multi := namedDrv(t, "multi")
	if got := multi.OutputNames(); !cmp.Equal(got, []string{"dev", "doc", "out"}) {
		t.Errorf("outputs %q", got)
	}
	_, dependent := namedDrv(t, "dependent")
	if got := dependent.InputDrvs[path]; !cmp.Equal(got, []string{"dev"}) {
		t.Errorf("input %q", got)
	}
	if got := dependent.Args; len(got) != 2 || !strings.Contains(got[1], string(multi.Outputs["dev"].Path)) {
		t.Errorf("args %q", got)
	}
	_, sources := namedDrv(t, "sources")
	if len(sources.InputSrcs) != 2 || !cmp.Equal(sources.References(), sources.InputSrcs) {
		t.Errorf("sources %q", sources.InputSrcs)
	}
}

func TestRealisationsGolden(t *testing.T) {
	lookup := lookupIn(t, goldenDrvs(t))
	m := NewModulo(lookup)
	byID := map[string]Realisation{}
	for _, line := range goldenRealisations(t) {
		r, err := ParseRealisation(line)
		if err != nil {
			t.Fatal(err)
		}
		byID[r.ID()] = r
	}
	realised := func(d *Derivation, output string) (StorePath, error) {
		if p := d.Outputs[output].Path; p != "" {
			return p, nil
		}
		h, err := m.RealisationHash(d)
		if err != nil {
			return "", err
		}
		r, ok := byID[Realisation{DrvHash: h, OutputName: output}.ID()]
		if !ok {
			return "", fmt.Errorf("no realisation of %s %s", d.Name, output)
		}
		return r.OutPath, nil
	}
	for _, attr := range []string{
		"floating", "floatingSelf", "floatingMulti", "floatingFlat", "floatingOn", "deferred", "deferredTwice",
	} {
		_, d := namedDrv(t, attr)
		resolved, err := d.Resolve(func(drv StorePath, output string) (StorePath, error) {
			in, err := lookup(drv)
			if err != nil {
				return "", err
			}
			return realised(in, output)
		})
		if err != nil {
			t.Errorf("%s: %v", attr, err)
			continue
		}
		for drv, outputs := range d.InputDrvs {
			for _, output := range outputs {
				if bytes.Contains(resolved.ATerm(), []byte(UpstreamPlaceholder(drv, output))) {
					t.Errorf("%s: a placeholder is left in %s", attr, resolved.ATerm())
				}
			}
		}
		if len(resolved.InputDrvs) > 0 {
			t.Errorf("%s: resolved to %s", attr, resolved.ATerm())
		}
		for _, output := range d.OutputNames() {
			want, err := realised(d, output)
			if err != nil {
				t.Errorf("%s: %v", attr, err)
			}
			// A floating output has its path from the build alone.
			if got := resolved.Outputs[output].Path; got != want && got != "" {
				t.Errorf("%s: output %s is %s, want %s", attr, output, got, want)
			}
			if strings.HasPrefix(attr, "deferred") && (resolved.Outputs[output].Path == "" || resolved.Env[output] != string(want)) {
				t.Errorf("%s: output %s is not settled: %s", attr, output, resolved.ATerm())
			}
		}
	}
}

func TestScratchPath(t *testing.T) {
	path, _ := namedDrv(t, "floatingSelf")
	got, err := ScratchPath(path, "out")
	if want := strings.TrimSpace(string(readGolden(t, "scratch"))); err != nil || "scratch "+string(got) != want {
		t.Errorf("%s, %v, want %s", got, err, want)
	}
}

func TestPlaceholders(t *testing.T) {
	path, d := namedDrv(t, "floating")
	if got := Placeholder("out"); d.Env["out"] != got {
		t.Errorf("own placeholder %s, want %s", got, d.Env["out"])
	}
	_, user := namedDrv(t, "deferred")
	if got := UpstreamPlaceholder(path, "out"); !strings.Contains(user.Args[1], got) {
		t.Errorf("%s is not in %q", got, user.Args)
	}
	path, _ = namedDrv(t, "floatingMulti")
	_, user = namedDrv(t, "floatingOn")
	if got := UpstreamPlaceholder(path, "dev"); !strings.Contains(user.Args[1], got) {
		t.Errorf("%s is not in %q", got, user.Args)
	}
}

func TestCheckRefusesLies(t *testing.T) {
	m := NewModulo(lookupIn(t, goldenDrvs(t)))
	_, other := namedDrv(t, "dependent")
	for name, lie := range map[string]func(d *Derivation){
		"path of another":        func(d *Derivation) { d.Outputs["out"] = other.Outputs["out"] },
		"environment of another": func(d *Derivation) { d.Env["out"] = string(other.Outputs["out"].Path) },
		"other script":           func(d *Derivation) { d.Args[1] += " " },
		"other name":             func(d *Derivation) { d.Name = "x" },
		"more environment":       func(d *Derivation) { d.Env["x"] = "" },
		"one output more": func(d *Derivation) {
			d.Outputs["dev"] = DerivationOutput{Path: other.Outputs["out"].Path}
		},
		"output of unknown input": func(d *Derivation) {
			path, _ := namedDrv(t, "floating")
			d.InputDrvs = map[StorePath][]string{path: {"out"}}
		},
	} {
		_, d := namedDrv(t, "simple")
		lie(d)
		if err := m.Check(d); !errors.Is(err, ErrOutputPath) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, lie := range map[string]func(d *Derivation){
		"hash": func(d *Derivation) {
			out := d.Outputs["out"]
			out.Hash = strings.Repeat("0", 64)
			d.Outputs["out"] = out
		},
		"path": func(d *Derivation) {
			out := d.Outputs["out"]
			out.Path = other.Outputs["out"].Path
			d.Outputs["out"] = out
		},
	} {
		_, d := namedDrv(t, "fixedFlat")
		lie(d)
		if err := m.Check(d); !errors.Is(err, ErrOutputPath) {
			t.Errorf("fixed, %s: %v", name, err)
		}
	}
	_, d := namedDrv(t, "dependent")
	for drv := range d.InputDrvs {
		d.InputDrvs[drv] = append(d.InputDrvs[drv], "no-such-output")
	}
	if err := m.Check(d); !errors.Is(err, ErrInvalidDerivation) {
		t.Errorf("no such output: %v", err)
	}
}

func TestKindInvalid(t *testing.T) {
	path := StorePath(StoreDir + "/" + strings.Repeat("0", 32) + "-x")
	hash := strings.Repeat("0", 64)
	for name, outputs := range map[string]map[string]DerivationOutput{
		"none":              {},
		"mixture":           {"out": {Path: path}, "dev": {}},
		"mixture of CA":     {"out": {HashAlgo: "r:sha256"}, "dev": {HashAlgo: "r:sha256", Hash: "impure"}},
		"algorithms":        {"out": {HashAlgo: "r:sha256"}, "dev": {HashAlgo: "r:sha1"}},
		"two fixed":         {"out": {path, "sha256", hash}, "dev": {path, "sha256", hash}},
		"fixed, not out":    {"dev": {path, "sha256", hash}},
		"fixed, no path":    {"out": {"", "sha256", hash}},
		"fixed, bad hash":   {"out": {path, "sha256", "00"}},
		"fixed, upper case": {"out": {path, "sha256", strings.Repeat("A", 64)}},
		"fixed, nix32":      {"out": {path, "sha256", strings.Repeat("0", 52)}},
		"hash alone":        {"out": {path, "", hash}},
		"algorithm":         {"out": {path, "sha3", hash}},
		"method":            {"out": {path, "x:sha256", hash}},
		"floating, path":    {"out": {path, "r:sha256", ""}},
		"impure, path":      {"out": {path, "r:sha256", "impure"}},
		"impure, no method": {"out": {"", "", "impure"}},
	} {
		d := &Derivation{Name: "x", Outputs: outputs}
		if k, err := d.Kind(); !errors.Is(err, ErrInvalidDerivation) {
			t.Errorf("%s: %v, %v", name, k, err)
		}
	}
}

// chain returns a lookup in a chain of so many derivations, each of which
// depends on the next, and the path of the first.
func chain(n int, loop bool) (func(StorePath) (*Derivation, error), StorePath) {
	path := func(i int) StorePath {
		return StorePath(fmt.Sprintf("%s/%032d-n%d.drv", StoreDir, i, i))
	}
	return func(p StorePath) (*Derivation, error) {
		var i int
		if _, err := fmt.Sscanf(p.Name(), "n%d.drv", &i); err != nil {
			return nil, err
		}
		d := &Derivation{
			Name: fmt.Sprintf("n%d", i), System: "x", Builder: "/b",
			Outputs: map[string]DerivationOutput{"out": {Path: path(i)}},
		}
		if i+1 < n {
			d.InputDrvs = map[StorePath][]string{path(i + 1): {"out"}}
		} else if loop {
			d.InputDrvs = map[StorePath][]string{path(0): {"out"}}
		}
		return d, nil
	}, path(0)
}

func TestModuloLongChain(t *testing.T) {
	lookup, first := chain(20000, false)
	m := NewModulo(lookup)
	if _, deferred, err := m.Hash(first); err != nil || deferred {
		t.Errorf("deferred %v, %v", deferred, err)
	}
}

func TestModuloLoop(t *testing.T) {
	lookup, first := chain(10, true)
	m := NewModulo(lookup)
	for range 2 { // an error is not remembered as a hash
		if _, _, err := m.Hash(first); err == nil {
			t.Error("a derivation that depends on itself has a hash")
		}
	}
	if len(m.memo) != 0 {
		t.Errorf("%d left", len(m.memo))
	}
}

func TestModuloLookupError(t *testing.T) {
	lookup, first := chain(10, false)
	broken := errors.New("broken")
	fail := true
	m := NewModulo(func(p StorePath) (*Derivation, error) {
		if fail && p.Name() == "n5.drv" {
			return nil, broken
		}
		return lookup(p)
	})
	if _, _, err := m.Hash(first); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	fail = false
	if _, _, err := m.Hash(first); err != nil {
		t.Errorf("later: %v", err)
	}
}

func BenchmarkModulo(b *testing.B) {
	lookup, first := chain(1000, false)
	for b.Loop() {
		if _, _, err := NewModulo(lookup).Hash(first); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/drv")
}
