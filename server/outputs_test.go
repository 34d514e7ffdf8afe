package server

import (
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/nixproto/nar"
	"nbd/vm"
)

func TestOutputReferencesAcrossWrites(t *testing.T) {
	bt := newBuildTest(t, nil)
	lib, other := bt.add("lib", "1"), bt.add("other", "2")
	d := drv("x", "out", "dev", "doc")
	d.InputSrcs = []nixproto.StorePath{lib, other}
	slices.Sort(d.InputSrcs)
	bt.runner.act("x", func(f *fakeRun) error {
		if err := f.write("out", f.path("out")+" "+string(lib), false); err != nil {
			return err
		}
		if err := f.output("dev", func(w *nar.Writer) error { // a link into a sibling, in a directory
			if err := w.Directory(""); err != nil {
				return err
			}
			if err := w.Symlink("link", f.path("out")+"/x"); err != nil {
				return err
			}
			return w.EndDirectory()
		}); err != nil {
			return err
		}
		// A hash part alone counts; in a file's name too.
		return f.output("doc", func(w *nar.Writer) error {
			if err := w.Directory(""); err != nil {
				return err
			}
			if err := w.File(other.HashPart(), true, 0); err != nil {
				return err
			}
			return w.EndDirectory()
		})
	})
	r, _ := bt.build(bt.request(d))
	wantStatus(t, r, nixproto.Built)
	out, dev, doc := d.Outputs["out"].Path, d.Outputs["dev"].Path, d.Outputs["doc"].Path
	for p, want := range map[nixproto.StorePath][]nixproto.StorePath{out: {lib, out}, dev: {out}, doc: {other}} {
		slices.Sort(want)
		if got := bt.info(p).References; !slices.Equal(got, want) {
			t.Errorf("references of %s: %v, want %v", p, got, want)
		}
	}
}

func TestOutputCycle(t *testing.T) {
	for _, d := range []*nixproto.Derivation{drv("cycle", "out", "b", "c"), floatingDrv("cycle", "out", "b", "c")} {
		bt := newBuildTest(t, nil)
		bt.runner.act("cycle", func(f *fakeRun) error {
			if err := f.write("out", f.path("b"), false); err != nil {
				return err
			}
			if err := f.write("b", f.path("out"), false); err != nil {
				return err
			}
			return f.write("c", "", false)
		})
		r, _ := bt.build(bt.request(d))
		wantError(t, r, nixproto.OutputRejected, "cycle detected in build of '/nix/store/", "'b', 'out'")
		if strings.Contains(r.Error, "'c'") {
			t.Errorf("blames an output that is no part of it: %s", r.Error)
		}
	}
}

func TestOutputMissing(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error { return f.write("out", "", false) })
	r, _ := bt.build(bt.request(drv("x", "out", "dev")))
	wantError(t, r, nixproto.OutputRejected, "failed to produce output 'dev'")
}

func TestOutputChecks(t *testing.T) {
	bt := newBuildTest(t, nil)
	lib := bt.add("lib", "1")
	tool := bt.add("tool", string(lib), lib)
	for i, c := range []struct {
		name    string
		env     map[string]string // of the checked derivation; $lib, $tool and $unrelated are paths
		json    string            // structured attributes instead
		content string
		parts   []string // of the error; nil if it is to succeed
	}{
		{"allowed", map[string]string{"allowedReferences": "out $tool"}, "", "$out $tool", nil},
		{"below a path", map[string]string{"allowedReferences": "$tool/bin/x"}, "", "$tool", nil},
		{"nothing allowed", map[string]string{"allowedReferences": ""}, "", "$tool", []string{"is not allowed to refer to the following paths:\n  $tool"}},
		{"self not allowed", map[string]string{"allowedReferences": "$tool"}, "", "$out $tool", []string{"not allowed to refer", "$out"}},
		{"disallowed", map[string]string{"disallowedReferences": "$tool"}, "", "$tool", []string{"not allowed", "$tool"}},
		{"disallowed, not used", map[string]string{"disallowedReferences": "$lib"}, "", "$tool", nil},
		{"requisites", map[string]string{"allowedRequisites": "$tool $lib"}, "", "$out $tool", nil},
		{"requisites violated", map[string]string{"allowedRequisites": "$tool"}, "", "$tool", []string{"not allowed", "  $lib"}},
		{"disallowed requisite", map[string]string{"disallowedRequisites": "$lib"}, "", "$tool", []string{"not allowed", "  $lib"}},
		{"no path", map[string]string{"allowedReferences": "nonsense"}, "", "", []string{"'nonsense'"}},
		{"sizes do not count without structured attributes", map[string]string{"maxSize": "1"}, "", "a lot", nil},

		{"structured, allowed", nil, `{"outputChecks":{"out":{"allowedReferences":["$tool"]}}}`, "$tool", nil},
		{"structured, violated", nil, `{"outputChecks":{"out":{"allowedReferences":[]}}}`, "$tool", []string{"not allowed", "$tool"}},
		{"structured, another output", nil, `{"outputChecks":{"dev":{"allowedReferences":[]}}}`, "$tool", nil},
		{"structured, variables do not count", nil, `{"allowedReferences":[]}`, "$tool", nil},
		{"structured, self in requisites", nil, `{"outputChecks":{"out":{"allowedRequisites":[]}}}`, "$out", []string{"not allowed"}},
		{"structured, ignoring self", nil, `{"outputChecks":{"out":{"allowedRequisites":[],"ignoreSelfRefs":true}}}`, "$out", nil},
		{"structured, disallowed", nil, `{"outputChecks":{"out":{"disallowedRequisites":["$lib"]}}}`, "$tool", []string{"not allowed", "$lib"}},
		{"maxSize", nil, `{"outputChecks":{"out":{"maxSize":1000}}}`, strings.Repeat("x", 2000), []string{"is too large at 2", "limit is 1000 bytes"}},
		{"maxSize, small", nil, `{"outputChecks":{"out":{"maxSize":1000}}}`, "x", nil},
		{"maxClosureSize", nil, `{"outputChecks":{"out":{"maxClosureSize":300}}}`, "$tool", []string{"closure of path '$out' is too large"}},
		{"maxClosureSize, alone", nil, `{"outputChecks":{"out":{"maxClosureSize":300}}}`, "x", nil},
		{"structured, not as it should be", nil, `{"outputChecks":{"out":{"maxSize":"big"}}}`, "x", []string{"outputChecks"}},
		{"references discarded", nil, `{"unsafeDiscardReferences":{"out":true},"outputChecks":{"out":{"allowedReferences":[]}}}`, "$tool", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			bt.t = t
			d := drv(fmt.Sprint("x-", i))
			d.InputSrcs = []nixproto.StorePath{tool}
			fill := strings.NewReplacer("$lib", string(lib), "$tool", string(tool))
			for k, v := range c.env {
				d.Env[k] = fill.Replace(v)
			}
			if c.json != "" {
				d.Env["__json"] = fill.Replace(c.json)
			}
			d.Env["content"] = fill.Replace(c.content)
			r, _ := bt.build(bt.request(d))
			if c.parts == nil {
				wantStatus(t, r, nixproto.Built)
				return
			}
			for i := range c.parts {
				c.parts[i] = strings.ReplaceAll(fill.Replace(c.parts[i]), "$out", string(d.Outputs["out"].Path))
			}
			wantError(t, r, nixproto.OutputRejected, c.parts...)
		})
	}
}

// fixedCase is a build with a fixed output.
type fixedCase struct {
	name, algo string
	hash       nixproto.Hash
	make       func(*fakeRun) error
	parts      []string
}

func TestOutputFixed(t *testing.T) {
	const text = "fixed text"
	file := func(f *fakeRun) error { return f.write("out", text, false) }
	sum := func(a nixproto.HashAlgo, b []byte) nixproto.Hash { return nixproto.NewHash(a, b) }
	md, s1, s512 := md5.Sum([]byte(text)), sha1.Sum([]byte(text)), sha512.Sum512([]byte(text))
	var tree strings.Builder
	writeTree := func(w *nar.Writer) error {
		if err := w.Directory(""); err != nil {
			return err
		}
		if err := w.File("a", true, 1); err != nil {
			return err
		}
		if _, err := io.WriteString(w, "x"); err != nil {
			return err
		}
		return w.EndDirectory()
	}
	w := nar.NewWriter(&tree)
	if err := writeTree(w); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	directory := func(f *fakeRun) error { return f.output("out", writeTree) }
	treeSHA1 := sha1.Sum([]byte(tree.String()))
	wrong := nixproto.SumSHA256([]byte("another text"))
	right := nixproto.SumSHA256([]byte(text))
	bt := newBuildTest(t, nil)
	for i, c := range []fixedCase{
		{"md5", "md5", sum(nixproto.MD5, md[:]), file, nil},
		{"sha1", "sha1", sum(nixproto.SHA1, s1[:]), file, nil},
		{"sha256", "sha256", right, file, nil},
		{"sha512", "sha512", sum(nixproto.SHA512, s512[:]), file, nil},
		{"text", "text:sha256", right, file, nil},
		{"recursive", "r:sha256", nixproto.SumSHA256([]byte(tree.String())), directory, nil},
		{"recursive sha1", "r:sha1", sum(nixproto.SHA1, treeSHA1[:]), directory, nil},
		{"wrong", "sha256", wrong, file, []string{
			"hash mismatch in fixed-output derivation '/nix/store/",
			"-f-7.drv':\n  specified: " + wrong.SRI() + "\n     got:    " + right.SRI()}},
		{"recursive wrong", "r:sha256", wrong, directory, []string{"hash mismatch", nixproto.SumSHA256([]byte(tree.String())).SRI()}},
		{"executable", "sha256", right, func(f *fakeRun) error { return f.write("out", text, true) }, []string{"should be a non-executable regular file"}},
		{"directory", "sha256", right, directory, []string{"should be a non-executable regular file"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			bt.t = t
			name := fmt.Sprint("f-", i)
			bt.runner.act(name, c.make)
			d := fixedDrv(t, name, c.algo, c.hash)
			r, _ := bt.build(bt.request(d))
			if c.parts != nil {
				wantError(t, r, nixproto.OutputRejected, c.parts...)
				return
			}
			wantStatus(t, r, nixproto.Built)
			info := bt.info(d.Outputs["out"].Path)
			if ca, err := nixproto.ParseContentAddress(info.CA); err != nil || ca.Hash != c.hash || nixproto.CheckCA(info) != nil {
				t.Errorf("content address %q", info.CA)
			}
		})
	}
}

func TestOutputFixedMustNotRefer(t *testing.T) {
	bt := newBuildTest(t, nil)
	lib := bt.add("lib", "1")
	d := fixedDrv(t, "f", "sha256", nixproto.SumSHA256([]byte(lib)))
	d.InputSrcs = []nixproto.StorePath{lib}
	d.Env["content"] = string(lib)
	r, _ := bt.build(bt.request(d))
	wantError(t, r, nixproto.OutputRejected, "references", "'"+string(lib)+"'")
}

func TestOutputFloating(t *testing.T) {
	bt := newBuildTest(t, nil)
	lib := bt.add("lib", "1")
	d := floatingDrv("ca", "out", "dev", "plain")
	d.InputSrcs = []nixproto.StorePath{lib}
	d.Env["here"] = "in " + nixproto.Placeholder("dev")
	bt.runner.act("ca", func(f *fakeRun) error {
		out, dev := f.path("out"), f.path("dev")
		if got := f.spec.Drv.Env["here"]; got != "in "+dev {
			t.Errorf("placeholder became %q", got)
		}
		if f.spec.Drv.Env["out"] != out {
			t.Errorf("$out is %q, not %q", f.spec.Drv.Env["out"], out)
		}
		for name, text := range map[string]string{
			"out":   "self " + out + " sibling " + dev + " " + string(lib),
			"dev":   "self " + dev,
			"plain": "nothing",
		} {
			if err := f.write(name, text, false); err != nil {
				return err
			}
		}
		return nil
	})
	r, _ := bt.build(bt.request(d))
	wantStatus(t, r, nixproto.Built)
	out, dev, plain := r.Outputs["out"].OutPath, r.Outputs["dev"].OutPath, r.Outputs["plain"].OutPath
	if got, want := bt.content(out), "self "+string(out)+" sibling "+string(dev)+" "+string(lib); got != want {
		t.Errorf("out holds %q, want %q", got, want)
	}
	if got, want := bt.content(dev), "self "+string(dev); got != want {
		t.Errorf("dev holds %q, want %q", got, want)
	}
	for p, want := range map[nixproto.StorePath][]nixproto.StorePath{out: {out, dev, lib}, dev: {dev}, plain: nil} {
		info := bt.info(p)
		slices.Sort(want)
		if !slices.Equal(info.References, want) {
			t.Errorf("references of %s: %v, want %v", p, info.References, want)
		}
		bt.checkAddress(info)
	}
	if dev.Name() != "ca-dev" || out.Name() != "ca" {
		t.Errorf("names %s, %s", out, dev)
	}
	// The same again is known.
	r2, _ := bt.build(bt.request(d))
	wantStatus(t, r2, nixproto.AlreadyValid)
	if r2.Outputs["out"].OutPath != out || r2.Outputs["out"].DrvHash != r.Outputs["out"].DrvHash {
		t.Errorf("known as %+v", r2.Outputs["out"])
	}
}

// checkAddress recomputes a content address from the stored bytes.
func (bt *buildTest) checkAddress(info *nixproto.PathInfo) {
	bt.t.Helper()
	if err := nixproto.CheckCA(info); err != nil {
		bt.t.Error(err)
	}
	h, ca, err := nixproto.CAHasherFor(info)
	if err != nil {
		bt.t.Fatal(err)
	}
	if h == nil {
		return
	}
	blob, err := bt.st.OpenBlob(bt.t.Context(), info.NarHash)
	if err != nil {
		bt.t.Fatal(err)
	}
	defer blob.Close()
	if _, err := io.Copy(h, io.NewSectionReader(blob, 0, blob.Size())); err != nil {
		bt.t.Fatal(err)
	}
	if err := h.Check(ca); err != nil {
		bt.t.Error(err)
	}
}

func TestOutputFloatingMethods(t *testing.T) {
	bt := newBuildTest(t, nil)
	lib := bt.add("lib", "1")
	for i, c := range []struct {
		algo, content string
		parts         []string
	}{
		{"r:sha256", "x", nil},
		{"r:sha512", "x", nil},
		{"sha256", "x", nil},
		{"sha1", "x", nil},
		{"text:sha256", "x $lib", nil},
		{"sha256", "x $lib", []string{"cannot be content-addressed"}},
		{"r:sha1", "$out", []string{"cannot be content-addressed"}},
	} {
		t.Run(c.algo+" "+c.content, func(t *testing.T) {
			bt.t = t
			d := floatingDrv(fmt.Sprint("ca-", i))
			d.Outputs["out"] = nixproto.DerivationOutput{HashAlgo: c.algo}
			d.InputSrcs = []nixproto.StorePath{lib}
			d.Env["content"] = strings.ReplaceAll(c.content, "$lib", string(lib))
			r, _ := bt.build(bt.request(d))
			if c.parts != nil {
				wantError(t, r, nixproto.OutputRejected, c.parts...)
				return
			}
			wantStatus(t, r, nixproto.Built)
			bt.checkAddress(bt.info(r.Outputs["out"].OutPath))
		})
	}
}

// A file that is named after a path changes its place among the others when
// the path changes; the archive has to stay one.
func TestOutputFloatingWithPathsAsNames(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("ca", func(f *fakeRun) error {
		own := nixproto.StorePath(f.path("out"))
		return f.output("out", func(w *nar.Writer) error {
			if err := w.Directory(""); err != nil {
				return err
			}
			// Neighbours so close that any other hash part has another order.
			for _, name := range []string{own.HashPart(), own.HashPart()[:31] + "~"} {
				if err := w.File(name, false, 0); err != nil {
					return err
				}
			}
			return w.EndDirectory()
		})
	})
	r, _ := bt.build(bt.request(floatingDrv("ca")))
	if r.Status == nixproto.Built {
		bt.checkAddress(bt.info(r.Outputs["out"].OutPath))
		return // the new name happens to be in order
	}
	wantError(t, r, nixproto.OutputRejected, "names of files")
}

func TestOutputMalformed(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error {
		out, err := f.outs.Create(f.ctx, "out")
		if err != nil {
			return err
		}
		_, err = io.WriteString(out, strings.Repeat("no archive", 100))
		out.Abort()
		if err == nil {
			t.Error("wrote what is no archive")
		}
		return err
	})
	r, _ := bt.build(bt.request(drv("x")))
	if r.Status.Success() {
		t.Errorf("result %+v", r)
	}
}

// A damaged output is replaced by repair, and by nothing else.
// TestOutputEntries: what is known of outputs before they are registered is
// bounded for all of them together.
func TestOutputEntries(t *testing.T) {
	bt := newBuildTest(t, nil)
	p := &produced{store: bt.st, outs: map[string]*producedOutput{"out": {name: "out"}, "dev": {name: "dev"}}, entries: 1}
	defer p.discard()
	run := &fakeRun{ctx: t.Context(), outs: p}
	if err := run.write("out", "x", false); err != nil {
		t.Fatal(err)
	}
	var refused *vm.OutputError
	if err := run.write("dev", "x", false); !errors.As(err, &refused) {
		t.Errorf("one file too many: %v", err)
	}
}

func TestOutputRepair(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error { return f.write("out", strings.Repeat("a large file ", 100_000), false) })
	req := bt.request(drv("x"))
	r, _ := bt.build(req)
	wantStatus(t, r, nixproto.Built)
	path := r.Outputs["out"].OutPath
	damage(t, bt.dir, int64(bt.info(path).NarSize))
	req.Mode = nixproto.BuildRepair
	r, _ = bt.build(req)
	wantStatus(t, r, nixproto.Built)
	if n := bt.runner.count("x"); n != 2 {
		t.Errorf("%d runs", n)
	}
	if !strings.HasPrefix(bt.content(path), "a large file") {
		t.Error("still damaged")
	}
	if report, err := bt.st.Check(t.Context(), true); err != nil || !report.OK() {
		t.Errorf("check: %+v, %v", report, err)
	}
}

// damage changes a byte of the file of that size below dir.
func damage(t *testing.T, dir string, size int64) {
	t.Helper()
	done := false
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil || info.Size() < size {
			return err
		}
		if err := os.Chmod(path, 0o600); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		done = true
		_, err = f.WriteAt([]byte("!"), size/2)
		return err
	})
	if err != nil || !done {
		t.Fatalf("no file of %d bytes to damage: %v", size, err)
	}
}

func FuzzOutputChecks(f *testing.F) {
	f.Add("out /nix/store/x", `{"outputChecks":{"out":{"maxSize":1}}}`)
	f.Add("", `{"outputChecks":[],"requiredSystemFeatures":["a"],"__noChroot":true}`)
	f.Add("\xff", "")
	f.Fuzz(func(t *testing.T, words, attrs string) {
		d := drv("x")
		d.Env["allowedReferences"], d.Env["disallowedRequisites"] = words, words
		if attrs != "" {
			d.Env["__json"] = attrs
		}
		j := &job{drvPath: "/nix/store/00000000000000000000000000000000-x.drv", drv: d}
		out := &settled{name: "out", info: nixproto.PathInfo{Path: "/nix/store/00000000000000000000000000000001-x"}}
		out.staged = &producedOutput{seen: out.info.Path}
		_ = checkOutputs(j, nil, []*settled{out})
		b := &Builds{cfg: BuildsConfig{Runner: &fakeRunner{}}}
		if err := b.checkOffered(t.Context(), j.drvPath, d); err != nil && !isRefusal(err) {
			t.Error(err)
		}
		if attrs != "" && !json.Valid([]byte(attrs)) {
			if _, err := outputChecksOf(d); err == nil {
				t.Error("took attributes that are not JSON")
			}
		}
	})
}

// Nix before 2.17 computes the content address of what refers to itself in
// another way, and refuses the newer one.
func TestFloatingOutputForOldClient(t *testing.T) {
	paths := map[bool]map[string]nixproto.Realisation{}
	for _, old := range []bool{false, true} {
		bt := newBuildTest(t, nil)
		bt.session.beforeSelfHash = old
		d := floatingDrv("ca", "self", "plain")
		bt.runner.act("ca", func(f *fakeRun) error {
			return errors.Join(f.write("self", "I am "+f.path("self"), false), f.write("plain", "nothing", false))
		})
		r, _ := bt.build(bt.request(d))
		wantStatus(t, r, nixproto.Built)
		bt.checkAddress(bt.info(r.Outputs["self"].OutPath))
		paths[old] = r.Outputs
	}
	if paths[false]["self"].OutPath == paths[true]["self"].OutPath {
		t.Error("what refers to itself has one address for old and new clients")
	}
	if paths[false]["plain"].OutPath != paths[true]["plain"].OutPath {
		t.Error("what does not refer to itself has two addresses")
	}
}
