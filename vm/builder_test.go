package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
	"nbd/vm/link"
)

const builderDir = "testdata/builder"

// builderCase reads one of the recorded builds.
func builderCase(t *testing.T, name string) (*Spec, derivationLookup) {
	t.Helper()
	dir := filepath.Join(builderDir, name)
	drvs, err := filepath.Glob(filepath.Join(dir, "*.drv"))
	if err != nil || len(drvs) != 1 {
		t.Fatalf("%v, %v", drvs, err)
	}
	spec := &Spec{BuildID: "1", Cores: 3, MemoryMiB: 1024}
	spec.DrvPath, spec.Drv = readDrv(t, drvs[0])
	spec.Inputs = readInputs(t, filepath.Join(dir, "inputs.json"))
	for _, name := range spec.Drv.OutputNames() {
		p := spec.Drv.Outputs[name].Path
		if p == "" {
			p = recordedOutput(t, dir, name)
		}
		spec.Outputs = append(spec.Outputs, Output{Name: name, Path: p})
	}
	spec.Drv.InputDrvs = nil
	return spec, func(p nixproto.StorePath) (*nixproto.Derivation, error) {
		_, drv := readDrv(t, filepath.Join(dir, "drvs", p.Base()))
		return drv, nil
	}
}

// recordedOutput returns the path of a floating output. The builder was given
// another one, but in what it kept Nix has replaced that by the final path.
func recordedOutput(t *testing.T, dir, name string) nixproto.StorePath {
	t.Helper()
	environ, err := os.ReadFile(filepath.Join(dir, "environ"))
	if err != nil {
		t.Fatal(err)
	}
	for _, item := range strings.Split(string(environ), "\x00") {
		if path, ok := strings.CutPrefix(item, name+"="); ok {
			return nixproto.StorePath(path)
		}
	}
	t.Fatalf("no output %s in the environment", name)
	return ""
}

func readDrv(t *testing.T, file string) (nixproto.StorePath, *nixproto.Derivation) {
	t.Helper()
	path, err := nixproto.ParseBaseName(filepath.Base(file))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	drv, err := nixproto.ParseDerivation(strings.TrimSuffix(path.Name(), ".drv"), text)
	if err != nil {
		t.Fatal(err)
	}
	return path, drv
}

func readInputs(t *testing.T, file string) []nixproto.PathInfo {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var infos map[nixproto.StorePath]struct {
		CA, NarHash string
		NarSize     uint64
		References  []nixproto.StorePath
	}
	if err := json.Unmarshal(text, &infos); err != nil {
		t.Fatal(err)
	}
	var list []nixproto.PathInfo
	for _, p := range slices.Sorted(maps.Keys(infos)) {
		info := infos[p]
		hash, err := nixproto.ParseHash(nixproto.SHA256, info.NarHash)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, nixproto.PathInfo{Path: p, NarHash: hash, NarSize: info.NarSize, References: info.References, CA: info.CA})
	}
	return list
}

// TestOrderIsWhatNixGives compares orders with what builders got from Nix.
func TestOrderIsWhatNixGives(t *testing.T) {
	for _, name := range []string{"plain", "outputs", "graph", "graph-drv", "structured", "floating", "fixed"} {
		t.Run(name, func(t *testing.T) {
			spec, lookup := builderCase(t, name)
			order, err := orderBuild(spec, lookup)
			if err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(builderDir, name)
			if name == "fixed" {
				want, err := os.ReadFile(filepath.Join(dir, "environ.lines"))
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(string(want), string(bytes.Join(order.Env, []byte("\n")))+"\n"); diff != "" {
					t.Error(diff)
				}
				return
			}
			compareZeroed(t, filepath.Join(dir, "environ"), order.Env)
			compareZeroed(t, filepath.Join(dir, "cmdline"), order.Args)
			got := map[string]string{}
			for _, f := range order.Files {
				got[f.Name] = string(f.Data)
			}
			if diff := cmp.Diff(readFiles(t, filepath.Join(dir, "files")), got); diff != "" {
				t.Errorf("files (- Nix):\n%s", diff)
			}
			if len(order.Inputs) != len(spec.Inputs) || len(order.Outputs) != len(spec.Outputs) {
				t.Errorf("%d inputs and %d outputs", len(order.Inputs), len(order.Outputs))
			}
		})
	}
}

// compareZeroed compares a list with a file of zero-terminated items.
func compareZeroed(t *testing.T, file string, got [][]byte) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
	var items []string
	for _, b := range got {
		items = append(items, string(b))
	}
	if diff := cmp.Diff(want, items); diff != "" {
		t.Errorf("%s (- Nix):\n%s", filepath.Base(file), diff)
	}
}

func readFiles(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = string(b)
	}
	return files
}

// plainSpec returns a build with these attributes.
func plainSpec(env map[string]string) *Spec {
	const out = "/nix/store/8b5pmbnyr2pqd7whh57s7pk4yj4g0m4c-x"
	return &Spec{
		BuildID: "1", Cores: 1, MemoryMiB: 512,
		DrvPath: "/nix/store/s66mzxpvicwk07gjbjfw9izjfa797vsw-x.drv",
		Drv: &nixproto.Derivation{
			Name: "x", System: "x86_64-linux", Builder: "/bin/sh", Env: env,
			Outputs: map[string]nixproto.DerivationOutput{"out": {Path: out}},
		},
		Outputs: []Output{{Name: "out", Path: out}},
	}
}

func noDerivations(p nixproto.StorePath) (*nixproto.Derivation, error) {
	return nil, fmt.Errorf("nobody may ask for %s", p)
}

func TestOrderRefuses(t *testing.T) {
	const other = "/nix/store/26xbg1ndr7hbcncrlf9nhx5is2b25d13-other"
	for _, tt := range []struct {
		name string
		edit func(*Spec)
		want string
	}{
		{"no outputs", func(s *Spec) { s.Drv.Outputs = nil }, "output"},
		{"__noChroot", func(s *Spec) { s.Drv.Env["__noChroot"] = "1" },
			"derivation '/nix/store/s66mzxpvicwk07gjbjfw9izjfa797vsw-x.drv' has '__noChroot' set, but that's not allowed when 'sandbox' is 'true'"},
		{"__noChroot structured", func(s *Spec) { s.Drv.Env["__json"] = `{"__noChroot":true}` }, "__noChroot"},
		{"__noChroot of another type", func(s *Spec) { s.Drv.Env["__json"] = `{"__noChroot":1}` }, "not a boolean"},
		{"__impureHostDeps", func(s *Spec) { s.Drv.Env["__impureHostDeps"] = "/bin/cat /etc" }, "requested impure path '/bin/cat'"},
		{"bad JSON", func(s *Spec) { s.Drv.Env["__json"] = `{"a":` }, "cannot process __json attribute"},
		{"no object", func(s *Spec) { s.Drv.Env["__json"] = `null` }, "not an object"},
		{"two objects", func(s *Spec) { s.Drv.Env["__json"] = `{}{}` }, "something follows"},
		{"not UTF-8", func(s *Spec) { s.Drv.Env["__json"] = "{\"a\":\"\xff\"}" }, "UTF-8"},
		{"too deep", func(s *Spec) {
			s.Drv.Env["__json"] = `{"a":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + "}"
		}, "depth"},
		{"list of what", func(s *Spec) { s.Drv.Env["__json"] = `{"requiredSystemFeatures":[1]}` }, "not a list of strings"},
		{"no list", func(s *Spec) { s.Drv.Env["__json"] = `{"impureEnvVars":"x"}` }, "not a list"},
		{"odd graph", func(s *Spec) { s.Drv.Env["exportReferencesGraph"] = "a" }, "odd number of tokens"},
		{"graph's file", func(s *Spec) { s.Drv.Env["exportReferencesGraph"] = "../a " + other }, "invalid file name '../a'"},
		{"graph's path", func(s *Spec) { s.Drv.Env["exportReferencesGraph"] = "a /etc" }, "exportReferencesGraph"},
		{"graph of no input", func(s *Spec) { s.Drv.Env["exportReferencesGraph"] = "a " + other },
			"cannot export references of path '" + other + "' because it is not in the input closure"},
		{"graph of a number", func(s *Spec) { s.Drv.Env["__json"] = `{"exportReferencesGraph":{"a":[1]}}` }, "not an array or a string"},
		{"zero byte", func(s *Spec) { s.Drv.Env["a"] = "b\x00c" }, "zero byte"},
		{"zero byte in an argument", func(s *Spec) { s.Drv.Args = []string{"\x00"} }, "zero byte"},
		{"too much", func(s *Spec) { s.Drv.Env["a"] = strings.Repeat("x", maxOrder) }, "more than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := plainSpec(map[string]string{})
			tt.edit(spec)
			_, err := orderBuild(spec, noDerivations)
			var bad *SpecError
			if !errors.As(err, &bad) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want a SpecError with %q", err, tt.want)
			}
		})
	}
}

// A builtin builder is given the attributes as they are.
func TestOrderForBuiltin(t *testing.T) {
	spec := plainSpec(map[string]string{"url": "http://x", "passAsFile": "url", "exportReferencesGraph": "", "out": nixproto.Placeholder("out"), "PATH": "p"})
	spec.Drv.Builder, spec.Drv.System = "builtin:fetchurl", "builtin"
	order, err := orderBuild(spec, noDerivations)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"PATH=p", "exportReferencesGraph=", "out=" + nixproto.Placeholder("out"), "passAsFile=url", "url=http://x"}
	var got []string
	for _, e := range order.Env {
		got = append(got, string(e))
	}
	if diff := cmp.Diff(want, got); diff != "" || len(order.Args)+len(order.Files) > 0 || order.FixedOutput {
		t.Errorf("%s\n%+v", diff, order)
	}
	spec.Drv.Env["__noChroot"] = "1"
	if _, err := orderBuild(spec, noDerivations); err == nil {
		t.Error("it may leave the sandbox")
	}
}

// The largest order that is taken fits into a frame, with what comes to it: names
// of inputs, and certificates.
func TestLargestOrder(t *testing.T) {
	spec := plainSpec(map[string]string{"large": ""})
	spec.Drv.Env["large"] = strings.Repeat("x", maxOrder-1<<20)
	for range 50_000 {
		spec.Inputs = append(spec.Inputs, nixproto.PathInfo{Path: testPath(strings.Repeat("n", 40))})
	}
	order, err := orderBuild(spec, noDerivations)
	if err != nil {
		t.Fatal(err)
	}
	order.Network = &link.Network{Certificates: make([]byte, maxCertificates)}
	if err := link.Host(new(bytes.Buffer)).Send(order); err != nil {
		t.Error(err)
	}
}

func TestOrderForKVM(t *testing.T) {
	for env, want := range map[string]bool{"": false, "kvm": true, "big-parallel kvm": true, "kvmm": false} {
		order, err := orderBuild(plainSpec(map[string]string{"requiredSystemFeatures": env}), noDerivations)
		if err != nil {
			t.Fatal(err)
		}
		if order.KVM != want {
			t.Errorf("%q: KVM is %v", env, order.KVM)
		}
	}
}

// TestLookupErrorIsOurs tells a store that fails from a derivation that is bad.
func TestLookupErrorIsOurs(t *testing.T) {
	const drv = "/nix/store/26xbg1ndr7hbcncrlf9nhx5is2b25d13-y.drv"
	spec := plainSpec(map[string]string{"exportReferencesGraph": "a " + drv})
	spec.Inputs = []nixproto.PathInfo{{Path: drv}}
	gone := errors.New("gone")
	_, err := orderBuild(spec, func(nixproto.StorePath) (*nixproto.Derivation, error) { return nil, gone })
	var bad *SpecError
	if !errors.Is(err, gone) || errors.As(err, &bad) {
		t.Errorf("got %v", err)
	}
}

// TestNumbers has what the recorded build does not.
func TestNumbers(t *testing.T) {
	for _, tt := range []struct{ in, json, shell string }{
		{"-0", "0", "0"},
		{"-0.0", "-0.0", "0"},
		{"18446744073709551615", "18446744073709551615", "-1"},
		{"18446744073709551616", "1.8446744073709552e+19", "-2147483648"},
		{"-9223372036854775808", "-9223372036854775808", "0"},
		{"1e2", "100.0", "100"},
		{"1E+2", "100.0", "100"},
		{"0.00012", "0.00012", ""},
		{"0.000012", "1.2e-05", ""},
		{"5e-324", "5e-324", "0"},
		{"1e999", "null", "-2147483648"},
		{"0.1000000000000000055", "0.1", ""},
		{"9.999999999999999e+22", "9.999999999999999e+22", "-2147483648"},
		{"1.10", "1.1", ""},
		{"2147483647.0", "2147483647.0", "2147483647"},
	} {
		if got := nixNumber(json.Number(tt.in)); got != tt.json {
			t.Errorf("%s in JSON is %s, want %s", tt.in, got, tt.json)
		}
		if got, _ := shellNumber(json.Number(tt.in)); got != tt.shell {
			t.Errorf("%s in the shell is %q, want %q", tt.in, got, tt.shell)
		}
	}
}

func FuzzStructuredAttrs(f *testing.F) {
	_, attrs := readDrvOf(f, "structured")
	f.Add(attrs)
	f.Add(`{"a":[1,2.5,"\u0000",{"b":null}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		attrs, err := parseStructuredAttrs(text)
		if err != nil {
			return
		}
		shellDeclarations(attrs)
		first := appendJSON(nil, attrs)
		again, err := parseStructuredAttrs(string(first))
		if err != nil {
			t.Fatalf("%v in what was written: %s", err, first)
		}
		if second := appendJSON(nil, again); !bytes.Equal(first, second) {
			t.Errorf("%s becomes %s", first, second)
		}
	})
}

// readDrvOf returns the structured attributes of a recorded build.
func readDrvOf(f *testing.F, name string) (string, string) {
	f.Helper()
	drvs, err := filepath.Glob(filepath.Join(builderDir, name, "*.drv"))
	if err != nil || len(drvs) != 1 {
		f.Fatalf("%v, %v", drvs, err)
	}
	text, err := os.ReadFile(drvs[0])
	if err != nil {
		f.Fatal(err)
	}
	drv, err := nixproto.ParseDerivation(name, text)
	if err != nil {
		f.Fatal(err)
	}
	return drvs[0], drv.Env[structuredAttrsVar]
}
