package main

import (
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// A bench has the amounts, and the clients' stores with what they upload.
type bench struct {
	dir    string
	small  int   // paths
	big    int64 // bytes
	graph  int   // derivations
	rounds int
	idle   int // connections
	paths  int // in the store, to see what they cost

	store     string // the client's
	tools     string
	bigPaths  map[int][]string // by number; each is made when it is first needed
	smallSets [][]string
}

// A scenario prepares on a machine, and returns what is measured.
type scenario struct {
	name    string
	prepare func(b *bench, m *machine, round int) (func() error, error)
	rounds  int // zero for those of the bench
}

func (b *bench) scenarios() []scenario {
	return []scenario{
		{fmt.Sprintf("upload of one path of %d MiB", b.big>>20), func(b *bench, m *machine, round int) (func() error, error) {
			return b.uploadBig(m, "ssh-ng", round)
		}, 0},
		{fmt.Sprintf("upload of one path of %d MiB, ssh://", b.big>>20), func(b *bench, m *machine, round int) (func() error, error) {
			return b.uploadBig(m, "ssh", b.rounds+round)
		}, 0},
		{fmt.Sprintf("download of one path of %d MiB", b.big>>20), func(b *bench, m *machine, round int) (func() error, error) {
			return b.downloadBig(m, round)
		}, 0},
		{fmt.Sprintf("upload of %d small paths", b.small), func(b *bench, m *machine, round int) (func() error, error) {
			return b.upload(m, "ssh-ng", b.smallSets[round]), nil
		}, 0},
		{fmt.Sprintf("upload of %d small paths, ssh://", b.small), func(b *bench, m *machine, round int) (func() error, error) {
			return b.upload(m, "ssh", b.smallSets[b.rounds+round]), nil
		}, 0},
		{fmt.Sprintf("download of %d small paths", b.small), func(b *bench, m *machine, round int) (func() error, error) {
			return b.download(m, b.smallSets[round])
		}, 0},
		{fmt.Sprintf("what is known of %d valid paths", b.small), func(b *bench, m *machine, round int) (func() error, error) {
			if err := b.upload(m, "ssh-ng", b.smallSets[0])(); err != nil {
				return nil, err
			}
			return func() error {
				_, err := m.nix(b.store, append([]string{"nix", "path-info", "--json", "--store", "ssh-ng://bench"}, b.smallSets[0]...)...)
				return err
			}, nil
		}, 0},
		{"no-op build through the hook", noopBuild, 0},
		{"already built, through the hook", alreadyBuilt, 0},
		{fmt.Sprintf("%d tiny derivations in one graph", b.graph), tinyGraph, 1},
	}
}

func (b *bench) upload(m *machine, scheme string, paths []string) func() error {
	return func() error {
		_, err := m.nix(b.store, append([]string{"nix", "copy", "--no-check-sigs", "--to", scheme + "://bench"}, paths...)...)
		return err
	}
}

// uploadBig uploads a big path that is not there yet.
func (b *bench) uploadBig(m *machine, scheme string, number int) (func() error, error) {
	paths, err := b.bigPath(number)
	return b.upload(m, scheme, paths), err
}

// downloadBig downloads a big path.
func (b *bench) downloadBig(m *machine, number int) (func() error, error) {
	paths, err := b.bigPath(number)
	if err != nil {
		return nil, err
	}
	return b.download(m, paths)
}

// bigPath returns a path of the client's store.
func (b *bench) bigPath(number int) ([]string, error) {
	if paths := b.bigPaths[number]; paths != nil {
		return paths, nil
	}
	name := filepath.Join(b.dir, fmt.Sprintf("big-%d", number))
	if err := writeRandom(name, b.big); err != nil {
		return nil, err
	}
	paths, err := b.add(&machine{dir: b.dir}, []string{name})
	if err != nil {
		return nil, err
	}
	b.bigPaths[number] = paths
	return paths, os.Remove(name)
}

// download copies into a store that has nothing what is uploaded before, unless
// it was.
func (b *bench) download(m *machine, paths []string) (func() error, error) {
	if err := b.upload(m, "ssh-ng", paths)(); err != nil {
		return nil, err
	}
	to, err := os.MkdirTemp(b.dir, "download-*")
	return func() error {
		_, err := m.nix(b.store, append([]string{"nix", "copy", "--no-check-sigs", "--from", "ssh-ng://bench", "--to", to}, paths...)...)
		return err
	}, err
}

// derivation makes a new derivation in the client's store.
func (b *bench) derivation(m *machine, attr, seed string) (string, error) {
	return m.nix(b.store, "nix-instantiate", "-E", fmt.Sprintf(`
let
  bb = builtins.path { path = %q; name = "bb"; };
  run = name: parts: derivation {
    inherit name parts; system = "x86_64-linux"; builder = "${bb}/busybox"; args = [ "sh" "-c" "echo > $out" ]; seed = %q;
  };
in {
  one = run "one" [ ];
  graph = run "graph" (builtins.genList (i: run "part-${toString i}" [ ]) %d);
}.%s`, b.tools, seed, b.graph-1, attr))
}

func noopBuild(b *bench, m *machine, round int) (func() error, error) {
	drv, err := b.derivation(m, "one", fmt.Sprintf("noop-%s-%d", m.name, round))
	return func() error {
		_, err := m.nix(b.store, "nix-store", "-r", drv)
		return err
	}, err
}

// alreadyBuilt asks, with another client's store, for what the machine has.
func alreadyBuilt(b *bench, m *machine, round int) (func() error, error) {
	drv, err := b.derivation(m, "one", fmt.Sprintf("built-%s", m.name))
	if err != nil {
		return nil, err
	}
	if _, err := m.nix(b.store, "nix-store", "-r", drv); err != nil {
		return nil, err
	}
	other, err := os.MkdirTemp(b.dir, "other-*")
	if err != nil {
		return nil, err
	}
	if _, err := m.nix(b.store, "nix", "copy", "--no-check-sigs", "--derivation", "--to", other, drv); err != nil {
		return nil, err
	}
	return func() error {
		_, err := m.nix(other, "nix-store", "-r", drv)
		return err
	}, nil
}

// tinyGraph has the server walk a graph by itself.
func tinyGraph(b *bench, m *machine, round int) (func() error, error) {
	drv, err := b.derivation(m, "graph", fmt.Sprintf("graph-%s-%d", m.name, round))
	if err != nil {
		return nil, err
	}
	if _, err := m.nix(b.store, "nix", "copy", "--no-check-sigs", "--derivation", "--to", "ssh-ng://bench", drv); err != nil {
		return nil, err
	}
	return func() error {
		_, err := m.nix(b.store, "nix-store", "-r", drv, "--store", "ssh-ng://bench")
		return err
	}, nil
}

// prepare fills the client's store.
func (b *bench) prepare() error {
	b.bigPaths = make(map[int][]string)
	b.store, b.tools = filepath.Join(b.dir, "client"), filepath.Join(b.dir, "tools")
	m := &machine{dir: b.dir} // Nix without a machine
	if err := os.MkdirAll(b.tools, 0o755); err != nil {
		return err
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	if err := output(exec.Command("cp", busybox, b.tools)); err != nil {
		return err
	}
	for i := range 2 * b.rounds {
		var files []string
		for n := range b.small {
			name := filepath.Join(b.dir, "small", fmt.Sprintf("%d-%d", i, n))
			if err := writeRandom(name, 1500); err != nil {
				return err
			}
			files = append(files, name)
		}
		paths, err := b.add(m, files)
		if err != nil {
			return err
		}
		b.smallSets = append(b.smallSets, paths)
	}
	return nil
}

// add puts files into the client's store.
func (b *bench) add(m *machine, files []string) ([]string, error) {
	out, err := m.nix(b.store, append([]string{"nix-store", "--add"}, files...)...)
	return strings.Fields(out), err
}

func writeRandom(name string, size int64) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyN(f, rand.Reader, size)
	return err
}
