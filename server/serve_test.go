package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// serveDo is ServeClient.Do for a command that has to succeed.
func serveDo(t *testing.T, c *nixproto.ServeClient, req nixproto.ServeRequest, body func(*nixproto.Writer) error) nixproto.Response {
	t.Helper()
	resp, err := c.Do(req, body)
	if err != nil {
		t.Fatalf("%s: %v", req.Command(), err)
	}
	return resp
}

func TestServeTransfer(t *testing.T) {
	ts := newTestServer(t, nil)
	c, p := ts.serveClient(ts.alice)
	a := textPath(t, "a", "a")
	b := builtPath(t, "b", strings.Repeat("x", 1<<20), a.Path)
	for _, path := range []testPath{a, b} {
		serveDo(t, c, &nixproto.ServeAddToStoreNar{Info: path.PathInfo}, raw(path.nar))
	}
	valid := serveDo(t, c, &nixproto.ServeQueryValidPaths{Lock: true, Paths: []nixproto.StorePath{testDrv, b.Path}}, nil)
	if diff := cmp.Diff(&nixproto.PathSet{b.Path}, valid); diff != "" {
		t.Error(diff)
	}
	infos := *serveDo(t, c, &nixproto.ServeQueryPathInfos{Paths: []nixproto.StorePath{testDrv, b.Path}}, nil).(*nixproto.ServePathInfos)
	opts := cmp.Options{cmpopts.EquateEmpty(), cmp.AllowUnexported(nixproto.Hash{})}
	for i := range infos {
		infos[i] = uploaded(infos[i])
	}
	if diff := cmp.Diff(nixproto.ServePathInfos{b.PathInfo}, infos, opts); diff != "" {
		t.Error(diff)
	}
	closure := serveDo(t, c, &nixproto.ServeQueryClosure{Paths: []nixproto.StorePath{b.Path}}, nil).(*nixproto.PathSet)
	want := nixproto.PathSet{a.Path, b.Path}
	slices.Sort(want)
	if diff := cmp.Diff(&want, closure); diff != "" {
		t.Error(diff)
	}
	serveDo(t, c, &nixproto.ServeDumpStorePath{Path: b.Path}, nil)
	got := make([]byte, len(b.nar))
	if _, err := io.ReadFull(c.Reader, got); err != nil || !bytes.Equal(got, b.nar) {
		t.Errorf("another NAR, %v", err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if status := p.status(t); status != 0 || p.stderr.String() != "" {
		t.Errorf("exit status %d, %q", status, p.stderr)
	}
}

// TestServeExportImport sends an export stream of one account to another.
func TestServeExportImport(t *testing.T) {
	ts := newTestServer(t, nil)
	bobKey := newKey(t)
	ts.addAccount("bob", bobKey, nil)
	var paths []testPath
	var refs []nixproto.StorePath
	for i := range maxImport + 10 {
		paths = append(paths, builtPath(t, fmt.Sprint("p", i), fmt.Sprint(i), refs...))
		refs = []nixproto.StorePath{paths[i].Path}
	}
	ts.upload(ts.account.ID, paths...)
	var wanted []nixproto.StorePath
	for _, p := range paths {
		wanted = append(wanted, p.Path)
	}
	slices.Sort(wanted)
	alice, _ := ts.serveClient(ts.alice)
	serveDo(t, alice, &nixproto.ServeExportPaths{Paths: wanted}, nil)
	bob, p := ts.serveClient(bobKey)
	serveDo(t, bob, &nixproto.ServeImportPaths{}, func(w *nixproto.Writer) error {
		for {
			more, err := nixproto.ReadExportNext(alice.Reader)
			if err != nil || !more {
				return errors.Join(err, nixproto.WriteExportEnd(w))
			}
			err = nixproto.WriteExportNext(w)
			if err == nil {
				err = copyNAR(w, alice.Reader)
			}
			if err != nil {
				return err
			}
			info, err := nixproto.ReadExportInfo(alice.Reader)
			if err == nil {
				err = nixproto.WriteExportInfo(w, info)
			}
			if err != nil {
				return err
			}
		}
	})
	w := ts.worker(bobKey)
	checkPath(t, w, paths[len(paths)-1])
	checkPath(t, w, paths[0])
	if p.stderr.String() != "" {
		t.Error(p.stderr)
	}
}

// copyNAR copies exactly one NAR.
func copyNAR(w io.Writer, src nixproto.Source) error {
	p := new(nar.Parser)
	for !p.Done() {
		b, err := src.Peek()
		if err != nil {
			return err
		}
		n, err := p.Feed(b)
		if err != nil {
			return err
		}
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
		src.Discard(n)
	}
	return nil
}

// TestServeRefusals: an error is one line on stderr and exit status 1.
func TestServeRefusals(t *testing.T) {
	ts := newTestServer(t, nil)
	good := textPath(t, "good", "good")
	lie := builtPath(t, "lie", "lie")
	lie.NarHash = good.NarHash
	for name, send := range map[string]func(c *nixproto.ServeClient) error{
		"missing path": func(c *nixproto.ServeClient) error {
			return nixproto.WriteServeRequest(c.Writer, c.Version, &nixproto.ServeDumpStorePath{Path: testDrv})
		},
		"closure of a missing path": func(c *nixproto.ServeClient) error {
			return nixproto.WriteServeRequest(c.Writer, c.Version, &nixproto.ServeQueryClosure{Paths: []nixproto.StorePath{testDrv}})
		},
		"wrong hash": func(c *nixproto.ServeClient) error {
			return errors.Join(nixproto.WriteServeRequest(c.Writer, c.Version, &nixproto.ServeAddToStoreNar{Info: lie.PathInfo}), raw(lie.nar)(c.Writer))
		},
		"malformed import": func(c *nixproto.ServeClient) error {
			return errors.Join(nixproto.WriteServeRequest(c.Writer, c.Version, &nixproto.ServeImportPaths{}),
				nixproto.WriteExportNext(c.Writer), raw(bytes.Repeat([]byte("junk"), 100))(c.Writer))
		},
		"import without end": func(c *nixproto.ServeClient) error {
			return errors.Join(nixproto.WriteServeRequest(c.Writer, c.Version, &nixproto.ServeImportPaths{}),
				nixproto.WriteExportNext(c.Writer), raw(good.nar)(c.Writer), raw(make([]byte, 8))(c.Writer))
		},
		"another store": func(c *nixproto.ServeClient) error {
			return nixproto.WriteServeRequest(c.Writer, c.Version, &nixproto.ServeDumpStorePath{Path: "/gnu/store/" + nixproto.StorePath(testDrv.Base())})
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := ts.serveClient(ts.alice)
			if err := errors.Join(send(c), c.Writer.Flush()); err != nil {
				t.Fatal(err)
			}
			if status := p.status(t); status != 1 {
				t.Errorf("exit status %d", status)
			}
			text := p.stderr.String()
			if strings.Count(text, "\n") != 1 || !strings.HasPrefix(text, "nbd: error: ") || strings.Contains(text, "internal") {
				t.Errorf("stderr %q", text)
			}
		})
	}
	if w := ts.worker(ts.alice); w.isValid(t, lie.Path) || w.isValid(t, good.Path) {
		t.Error("something is left")
	}
}

// TestServeReadOnly: without --write nothing changes.
func TestServeReadOnly(t *testing.T) {
	ts := newTestServer(t, nil)
	p := textPath(t, "a", "a")
	for _, req := range []nixproto.ServeRequest{
		&nixproto.ServeAddToStoreNar{Info: p.PathInfo}, &nixproto.ServeImportPaths{}, &nixproto.ServeBuildPaths{},
	} {
		pipe := ts.exec(ts.dial(ts.alice), "nix-store --serve")
		c, err := nixproto.NewServeClient(pipe, nixproto.MaxServe)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(nixproto.WriteServeRequest(c.Writer, c.Version, req), c.Writer.Flush()); err != nil {
			t.Fatal(err)
		}
		if status := pipe.status(t); status != 1 || !strings.Contains(pipe.stderr.String(), "--write") {
			t.Errorf("%s: exit status %d, %q", req.Command(), status, pipe.stderr)
		}
	}
}

// TestServeBuild: the log is stderr, byte for byte; the options are limits.
func TestServeBuild(t *testing.T) {
	ts := newTestServer(t, nil)
	const text = "one\rtwo\x00\xff\n@nix {\"action\":\"setPhase\",\"phase\":\"p\"}\nlast\n"
	var limits Limits
	ts.builder.build = func(_ context.Context, _ *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error) {
		limits = req.Limits
		b := log.StartBuild(req.DrvPath)
		fmt.Fprint(b, text)
		b.Stop()
		return &nixproto.BuildResult{Status: nixproto.TimedOut, Error: "too slow"}, nil
	}
	c, p := ts.serveClient(ts.alice)
	req := &nixproto.ServeBuildDerivation{DrvPath: testDrv, Derivation: &nixproto.Derivation{},
		Options: nixproto.BuildOptions{MaxSilentTime: 66, Timeout: 77, MaxLogSize: 5_000_000, KeepFailed: true}}
	got := serveDo(t, c, req, nil).(*nixproto.BuildResult)
	if got.Status != nixproto.TimedOut || got.Error != "too slow" {
		t.Errorf("result %+v", got)
	}
	if want := (Limits{Timeout: 77 * time.Second, MaxSilent: 66 * time.Second, MaxLogSize: 5_000_000}); limits != want {
		t.Errorf("limits %+v", limits)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p.status(t)
	if p.stderr.String() != text {
		t.Errorf("stderr %q", p.stderr)
	}
}

// TestServeBuildForOldClient: an option that Nix dropped in 2.12 tells which way
// a client hashes what refers to itself.
func TestServeBuildForOldClient(t *testing.T) {
	ts := newTestServer(t, nil)
	var legacy []bool
	ts.builder.build = func(_ context.Context, s *Session, _ *BuildRequest, _ LogSink) (*nixproto.BuildResult, error) {
		legacy = append(legacy, s.beforeSelfHash)
		return &nixproto.BuildResult{Status: nixproto.Built}, nil
	}
	ts.builder.paths = func(_ context.Context, s *Session, _ *PathsRequest, _ LogSink) ([]nixproto.KeyedBuildResult, error) {
		legacy = append(legacy, s.beforeSelfHash)
		return nil, nil
	}
	for _, old := range []bool{true, false} {
		c, _ := ts.serveClient(ts.alice)
		options := nixproto.BuildOptions{EnforceDeterminism: old}
		serveDo(t, c, &nixproto.ServeBuildDerivation{DrvPath: testDrv, Derivation: &nixproto.Derivation{}, Options: options}, nil)
		serveDo(t, c, &nixproto.ServeBuildPaths{Paths: []nixproto.DerivedPath{{Path: testDrv, AllOutputs: true}}, Options: options}, nil)
	}
	if want := []bool{true, true, false, false}; !slices.Equal(legacy, want) {
		t.Errorf("old client: %t, want %t", legacy, want)
	}
}

// TestServeBuildPaths: a success of any kind is 0, a failure never 1 or 2.
func TestServeBuildPaths(t *testing.T) {
	ts := newTestServer(t, nil)
	status := nixproto.Built
	ts.builder.paths = func(_ context.Context, _ *Session, req *PathsRequest, _ LogSink) ([]nixproto.KeyedBuildResult, error) {
		r := nixproto.BuildResult{Status: status}
		if !status.Success() {
			r.Error = "no"
		}
		return []nixproto.KeyedBuildResult{{Path: req.Paths[0], BuildResult: nixproto.BuildResult{}}, {Path: req.Paths[1], BuildResult: r}}, nil
	}
	c, _ := ts.serveClient(ts.alice)
	paths := []nixproto.DerivedPath{{Path: testDrv, AllOutputs: true}, {Path: testDrv, Outputs: []string{"dev"}}}
	for status = nixproto.Built; status <= nixproto.NoSubstituters; status++ {
		got := serveDo(t, c, &nixproto.ServeBuildPaths{Paths: paths}, nil).(*nixproto.ServeBuildStatus)
		want := nixproto.ServeBuildStatus{Status: status, Error: "no"}
		if status.Success() {
			want = nixproto.ServeBuildStatus{}
		}
		if *got != want {
			t.Errorf("%d: %+v", status, got)
		}
	}
}

// TestServeClosureWithOutputs follows derivations to what they built.
func TestServeClosureWithOutputs(t *testing.T) {
	ts := newTestServer(t, nil)
	out := builtPath(t, "out", "out")
	drv := textPath(t, "x.drv", `Derive([("out","`+string(out.Path)+`","","")],[],[],"x86_64-linux","/bin/sh",[],[])`)
	user := textPath(t, "user", "user", drv.Path)
	ts.upload(ts.account.ID, out, drv, user)
	ts.builder.outputs = func(nixproto.StorePath) (map[string]nixproto.StorePath, error) {
		return map[string]nixproto.StorePath{"out": out.Path, "dev": builtPath(t, "dev", "").Path, "lib": ""}, nil
	}
	c, _ := ts.serveClient(ts.alice)
	for with, want := range map[bool]nixproto.PathSet{false: {drv.Path, user.Path}, true: {drv.Path, user.Path, out.Path}} {
		slices.Sort(want)
		got := serveDo(t, c, &nixproto.ServeQueryClosure{IncludeOutputs: with, Paths: []nixproto.StorePath{user.Path}}, nil)
		if diff := cmp.Diff(&want, got); diff != "" {
			t.Errorf("outputs %t: %s", with, diff)
		}
	}
}
