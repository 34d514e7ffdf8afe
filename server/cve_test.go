package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/store"
)

// One test for each advisory about Nix's daemon and store, of 2024 and later,
// that a server could be open to; the list is in vm/THREATS.md.

// CVE-2025-52992: what a failed build had made stayed in the store, writable. Here
// even a guest that sends all outputs of a build that failed leaves nothing.
func TestCVE202552992(t *testing.T) {
	bt := newBuildTest(t, nil)
	d := fixedDrv(t, "f", "sha256", nixproto.SumSHA256([]byte("right")))
	d.Env["content"] = "right"
	bt.runner.act("f", func(f *fakeRun) error { return errors.Join(f.writeContent(), exit(1)) })
	req := bt.request(d)
	before := bt.files()
	r, _ := bt.build(req)
	wantError(t, r, nixproto.TransientFailure, "exit code 1")
	if _, err := bt.session.Sight.Info(t.Context(), d.Outputs["out"].Path); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("the output is valid: %v", err)
	}
	for name := range bt.files() {
		if !before[name] && !strings.HasPrefix(name, "logs/") {
			t.Errorf("left behind: %s", name)
		}
	}
}

// files are the files of the state directory that have names.
func (bt *buildTest) files() map[string]bool {
	bt.t.Helper()
	files := map[string]bool{}
	err := filepath.WalkDir(bt.dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			files[path[len(bt.dir)+1:]] = true
		}
		return err
	})
	if err != nil {
		bt.t.Fatal(err)
	}
	return files
}

// Nix 2.35, commit e094bbd1cf: resolving a derivation asked again for what its
// inputs had been built as, on every way to each of them: twice as often with
// each level of content-addressed derivations.
func TestNixExponentialResolution(t *testing.T) {
	bt := newBuildTest(t, nil)
	var below nixproto.StorePath
	for i := range 48 {
		d := floatingDrv(fmt.Sprint("level-", i), "out", "dev")
		d.Env["content"] = fmt.Sprint(i)
		if below != "" {
			bt.dependsOn(d, below, "out", "dev")
		}
		below = bt.addDrv(d)
	}
	rs, _ := bt.paths(nixproto.BuildNormal, all(below))
	wantStatus(t, &rs[0].BuildResult, nixproto.Built)
	rs, _ = bt.paths(nixproto.BuildNormal, all(below))
	wantStatus(t, &rs[0].BuildResult, nixproto.AlreadyValid)
}
