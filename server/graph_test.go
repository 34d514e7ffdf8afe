package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
	"nbd/store"
)

func all(p nixproto.StorePath) nixproto.DerivedPath {
	return nixproto.DerivedPath{Path: p, AllOutputs: true}
}

func outputs(p nixproto.StorePath, names ...string) nixproto.DerivedPath {
	return nixproto.DerivedPath{Path: p, Outputs: names}
}

// missing asks what a build would do.
func (bt *buildTest) missing(paths ...nixproto.DerivedPath) *Missing {
	bt.t.Helper()
	bt.flush()
	m, err := bt.Missing(bt.t.Context(), bt.session, paths)
	if err != nil {
		bt.t.Fatal(err)
	}
	return m
}

// chain adds n derivations, each an input of the next, and returns their paths.
func (bt *buildTest) chain(name string, n int) []nixproto.StorePath {
	bt.t.Helper()
	paths := make([]nixproto.StorePath, n)
	for i := range paths {
		d := drv(fmt.Sprintf("%s-%d", name, i))
		if i > 0 {
			bt.dependsOn(d, paths[i-1], "out")
		}
		paths[i] = bt.addDrv(d)
	}
	return paths
}

func TestGraphChain(t *testing.T) {
	bt := newBuildTest(t, nil)
	chain := bt.chain("c", 5)
	top := chain[4]
	want := slices.Sorted(slices.Values(chain))
	if m := bt.missing(all(top)); !slices.Equal(m.WillBuild, want) || len(m.Unknown) != 0 {
		t.Errorf("missing %+v", m)
	}
	rs, sink := bt.paths(nixproto.BuildNormal, all(top), outputs(top, "out"))
	for _, r := range rs {
		wantStatus(t, &r.BuildResult, nixproto.Built)
		if r.Outputs["out"].OutPath == "" || !r.Path.Built() {
			t.Errorf("result %+v", r)
		}
	}
	if sink.last != [4]uint64{5, 5, 0, 0} {
		t.Errorf("progress %v", sink.last)
	}
	out := rs[0].Outputs["out"].OutPath
	closure, err := bt.st.Closure(t.Context(), bt.account.ID, []nixproto.StorePath{out})
	if err != nil || len(closure) != 5 {
		t.Errorf("closure %v, %v", closure, err)
	}
	if m := bt.missing(all(top)); len(m.WillBuild)+len(m.Unknown) != 0 {
		t.Errorf("missing after the build: %+v", m)
	}
	rs, _ = bt.paths(nixproto.BuildNormal, all(top))
	wantStatus(t, &rs[0].BuildResult, nixproto.AlreadyValid)
	hash := rs[0].Outputs["out"].DrvHash
	d, err := bt.readDrv(t.Context(), bt.session, top)
	if err != nil {
		t.Fatal(err)
	}
	if want, err := bt.modulo.RealisationHash(d); err != nil || want != hash {
		t.Errorf("hash %v, want %v, %v", hash, want, err)
	}
}

func TestGraphOpaqueAndUnknown(t *testing.T) {
	bt := newBuildTest(t, nil)
	there := bt.add("there", "x")
	chain := bt.chain("c", 1)
	gone := nixproto.StorePath("/nix/store/00000000000000000000000000000000-gone")
	goneDrv := gone + ".drv"
	m := bt.missing(nixproto.DerivedPath{Path: there}, nixproto.DerivedPath{Path: gone}, all(goneDrv), all(chain[0]))
	if diff := cmp.Diff(&Missing{WillBuild: chain, Unknown: []nixproto.StorePath{gone, goneDrv}}, m); diff != "" {
		t.Errorf("missing: %s", diff)
	}
	rs, _ := bt.paths(nixproto.BuildNormal, nixproto.DerivedPath{Path: there}, nixproto.DerivedPath{Path: gone}, all(goneDrv), outputs(chain[0], "nope"), all(chain[0]))
	wantStatus(t, &rs[0].BuildResult, nixproto.AlreadyValid)
	wantError(t, &rs[1].BuildResult, nixproto.NoSubstituters, string(gone))
	wantError(t, &rs[2].BuildResult, nixproto.MiscFailure, "is not valid")
	wantError(t, &rs[3].BuildResult, nixproto.MiscFailure, "has no output 'nope'")
}

func TestGraphGoesOnBesideAFailure(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("bad", func(f *fakeRun) error { f.say("a last word"); return exit(1) })
	bad, good := bt.addDrv(drv("bad")), bt.addDrv(drv("good"))
	middle := drv("middle")
	bt.dependsOn(middle, bad, "out")
	middlePath := bt.addDrv(middle)
	top := drv("top")
	bt.dependsOn(top, middlePath, "out")
	bt.dependsOn(top, good, "out")
	topPath := bt.addDrv(top)
	rs, sink := bt.paths(nixproto.BuildNormal, all(topPath), all(good), all(bad))
	wantError(t, &rs[0].BuildResult, nixproto.DependencyFailed, string(middlePath), "failed with exit code 1", "> a last word")
	wantStatus(t, &rs[1].BuildResult, nixproto.Built)
	wantError(t, &rs[2].BuildResult, nixproto.PermanentFailure, "failed with exit code 1")
	if bt.runner.count("middle")+bt.runner.count("top") != 0 {
		t.Error("built something whose input failed")
	}
	if sink.last != [4]uint64{4, 4, 0, 3} {
		t.Errorf("progress %v", sink.last)
	}
}

func TestGraphRefusals(t *testing.T) {
	bt := newBuildTest(t, nil)
	system := drv("system")
	system.System = "riscv64-linux"
	systemPath := bt.addDrv(system)
	user := drv("user")
	bt.dependsOn(user, systemPath, "out")
	userPath := bt.addDrv(user)

	squat := drv2(bt, "squat")
	squat.Env["content"] = "mine, at another's path"
	squatPath := bt.add("squat.drv", string(squat.ATerm()))

	lying := drv2(bt, "lying")
	lyingPath := bt.add("other.drv", string(lying.ATerm()))

	rs, _ := bt.paths(nixproto.BuildNormal, all(userPath), all(systemPath), all(squatPath), all(lyingPath))
	wantError(t, &rs[0].BuildResult, nixproto.DependencyFailed, "'riscv64-linux'")
	wantError(t, &rs[1].BuildResult, nixproto.InputRejected, "'riscv64-linux'")
	wantError(t, &rs[2].BuildResult, nixproto.InputRejected, "output path does not follow")
	wantError(t, &rs[3].BuildResult, nixproto.InputRejected, "output path does not follow")
	if len(bt.runner.runs) != 0 {
		t.Errorf("ran %v", bt.runner.runs)
	}
}

func TestGraphCheckIsOfWhatWasAskedFor(t *testing.T) {
	bt := newBuildTest(t, nil)
	chain := bt.chain("c", 2)
	rs, _ := bt.paths(nixproto.BuildCheck, all(chain[1]))
	wantError(t, &rs[0].BuildResult, nixproto.MiscFailure, "cannot be checked")
	rs, _ = bt.paths(nixproto.BuildNormal, all(chain[1]))
	wantStatus(t, &rs[0].BuildResult, nixproto.Built)
	rs, _ = bt.paths(nixproto.BuildCheck, all(chain[1]))
	wantStatus(t, &rs[0].BuildResult, nixproto.Built)
	if a, b := bt.runner.count("c-0"), bt.runner.count("c-1"); a != 1 || b != 2 {
		t.Errorf("%d and %d runs", a, b)
	}
}

// A derivation without input derivations whose outputs are partly there keeps
// those that are; the others are those of the run that is known.
func TestGraphBuildsMissingOutputs(t *testing.T) {
	bt := newBuildTest(t, nil)
	bt.runner.act("x", func(f *fakeRun) error {
		return errors.Join(f.write("dev", fmt.Sprint("dev ", f.try), false), f.write("out", fmt.Sprint("out ", f.try), false))
	})
	d := drv("x", "out", "dev")
	path := bt.addDrv(d)
	rs, _ := bt.paths(nixproto.BuildNormal, outputs(path, "dev"))
	wantStatus(t, &rs[0].BuildResult, nixproto.Built)
	if _, ok := rs[0].Outputs["out"]; ok {
		t.Error("told of an output that was not wanted")
	}
	bt.session.leases.Release()
	if _, err := bt.st.Delete(t.Context(), bt.account.ID, d.Outputs["out"].Path); err != nil {
		t.Fatal(err)
	}
	bt.session = bt.newSession(bt.account)
	rs, _ = bt.paths(nixproto.BuildNormal, outputs(path, "dev"))
	wantStatus(t, &rs[0].BuildResult, nixproto.AlreadyValid)
	rs, _ = bt.paths(nixproto.BuildNormal, outputs(path, "out"))
	wantStatus(t, &rs[0].BuildResult, nixproto.Built)
	if dev, out := bt.content(d.Outputs["dev"].Path), bt.content(d.Outputs["out"].Path); dev != "dev 1" || out != "out 1" {
		t.Errorf("dev %q, out %q", dev, out)
	}
}

func TestGraphCancelled(t *testing.T) {
	bt := newBuildTest(t, nil)
	begun := make(chan struct{})
	bt.runner.act("c-0", func(f *fakeRun) error { close(begun); <-f.ctx.Done(); return f.ctx.Err() })
	chain := bt.chain("c", 3)
	bt.flush()
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error)
	go func() {
		_, err := bt.BuildPaths(ctx, bt.session, &PathsRequest{Paths: []nixproto.DerivedPath{all(chain[2])}}, newFakeSink())
		done <- err
	}()
	<-begun
	cancel(errGone)
	if err := <-done; !errors.Is(err, errGone) {
		t.Errorf("error %v", err)
	}
}

// Ten layers of a hundred, each derivation with five inputs in the layer below.
// TestGraphWhileDraining: what runs may end and is answered; nothing new starts.
func TestGraphWhileDraining(t *testing.T) {
	bt := newBuildTest(t, nil)
	chain, beside := bt.chain("c", 2), bt.chain("beside", 1)
	begun, finish := make(chan struct{}, 2), make(chan struct{})
	for _, name := range []string{"c-0", "beside-0"} {
		bt.runner.act(name, func(f *fakeRun) error {
			begun <- struct{}{}
			<-finish
			return errors.Join(f.ctx.Err(), f.writeContent())
		})
	}
	drained := make(chan error, 1)
	go func() {
		<-begun
		<-begun
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		drained <- bt.Drain(ctx)
		close(finish)
	}()
	rs, _ := bt.paths(nixproto.BuildNormal, all(chain[1]), all(beside[0]))
	if err := <-drained; !errors.Is(err, context.Canceled) {
		t.Errorf("Drain: %v", err)
	}
	wantError(t, &rs[0].BuildResult, nixproto.TransientFailure, "shutting down")
	wantStatus(t, &rs[1].BuildResult, nixproto.Built)
	if n := bt.runner.count("c-1"); n != 0 {
		t.Error("a build was started while the server drained")
	}
}

// A panickySink is a mistake in showing a build.
type panickySink struct{ *fakeSink }

func (panickySink) StartBuild(nixproto.StorePath) BuildLog { panic("mistake") }

func TestGraphSurvivesPanics(t *testing.T) {
	bt := newBuildTest(t, nil)
	req := &PathsRequest{Paths: []nixproto.DerivedPath{all(bt.chain("c", 1)[0])}}
	bt.flush()
	if _, err := bt.BuildPaths(t.Context(), bt.session, req, panickySink{newFakeSink()}); err == nil || !strings.Contains(err.Error(), "mistake") {
		t.Errorf("error %v", err)
	}
}

func TestGraphOfAThousand(t *testing.T) {
	bt := newBuildTest(t, func(c *BuildsConfig) { c.Room.Guests = 32 })
	const layers, width = 10, 100
	var below []nixproto.StorePath
	for l := range layers {
		layer := make([]nixproto.StorePath, width)
		for i := range layer {
			d := drv(fmt.Sprintf("n-%d-%d", l, i))
			for k := range 5 {
				if below != nil {
					bt.dependsOn(d, below[(i+k*k)%width], "out")
				}
			}
			layer[i] = bt.addDrv(d)
		}
		below = layer
	}
	wanted := make([]nixproto.DerivedPath, width)
	for i, p := range below {
		wanted[i] = all(p)
	}
	start := time.Now()
	if m := bt.missing(wanted...); len(m.WillBuild) != layers*width {
		t.Errorf("%d to build", len(m.WillBuild))
	}
	t.Logf("planned in %v", time.Since(start))
	start = time.Now()
	rs, sink := bt.paths(nixproto.BuildNormal, wanted...)
	t.Logf("built in %v", time.Since(start))
	for i := range rs {
		wantStatus(t, &rs[i].BuildResult, nixproto.Built)
	}
	if sink.last != [4]uint64{layers * width, layers * width, 0, 0} {
		t.Errorf("progress %v", sink.last)
	}
	if len(bt.runner.runs) != layers*width {
		t.Errorf("%d derivations ran", len(bt.runner.runs))
	}
	for name, n := range bt.runner.runs {
		if n != 1 {
			t.Errorf("%s ran %d times", name, n)
		}
	}
	if bt.runner.most > 32 {
		t.Errorf("%d at once", bt.runner.most)
	}
}

func TestGraphOfALongChain(t *testing.T) {
	bt := newBuildTest(t, nil)
	const n = 3000
	chain := bt.chain("c", n)
	start := time.Now()
	if m := bt.missing(all(chain[n-1])); len(m.WillBuild) != n {
		t.Errorf("%d to build", len(m.WillBuild))
	}
	t.Logf("planned in %v", time.Since(start))
	bt.runner.act("c-0", func(f *fakeRun) error { return exit(9) })
	start = time.Now()
	rs, _ := bt.paths(nixproto.BuildNormal, all(chain[n-1]))
	t.Logf("failed in %v", time.Since(start))
	wantError(t, &rs[0].BuildResult, nixproto.DependencyFailed, "exit code 9")
}

func TestGraphContentAddressedChain(t *testing.T) {
	bt := newBuildTest(t, nil)
	// Two different builds with the same content.
	one, two := floatingDrv("ca"), floatingDrv("ca")
	one.Env["content"], two.Env["content"] = "same", "same"
	one.Env["n"], two.Env["n"] = "1", "2"
	onePath, twoPath := bt.addDrv(one), bt.addDrv(two)
	user := func(on nixproto.StorePath) *nixproto.Derivation {
		d := floatingDrv("user")
		bt.dependsOn(d, on, "out")
		return d
	}
	user1, user2 := bt.addDrv(user(onePath)), bt.addDrv(user(twoPath))
	later := drv("later") // input-addressed, above content-addressed ones
	bt.dependsOn(later, user1, "out")
	bt.dependsOn(later, user2, "out")
	laterPath := bt.addDrv(later)
	if later.Outputs["out"].Path != "" {
		t.Fatal("its path is not deferred")
	}

	bt.flush()
	if m, err := bt.OutputMap(t.Context(), bt.session, onePath); err != nil || m["out"] != "" || len(m) != 1 {
		t.Errorf("output map before: %v, %v", m, err)
	}
	rs, _ := bt.paths(nixproto.BuildNormal, all(onePath), all(twoPath), all(user1))
	for i := range rs {
		wantStatus(t, &rs[i].BuildResult, nixproto.Built)
	}
	same := rs[0].Outputs["out"].OutPath
	if rs[1].Outputs["out"].OutPath != same {
		t.Errorf("equal contents at %s and %s", same, rs[1].Outputs["out"].OutPath)
	}
	info := bt.info(same)
	if !strings.HasPrefix(info.CA, "fixed:r:sha256:") || nixproto.CheckCA(info) != nil {
		t.Errorf("content address %q: %v", info.CA, nixproto.CheckCA(info))
	}
	if got, want := bt.content(rs[2].Outputs["out"].OutPath), "user "+string(same); got != want {
		t.Errorf("user has %q, want %q", got, want)
	}
	m, err := bt.OutputMap(t.Context(), bt.session, onePath)
	if err != nil || m["out"] != same {
		t.Errorf("output map: %v, %v", m, err)
	}

	// user2 resolves to the derivation that user1 resolved to.
	rs2, _ := bt.paths(nixproto.BuildNormal, all(user2))
	wantStatus(t, &rs2[0].BuildResult, nixproto.ResolvesToAlreadyValid)
	if rs2[0].Outputs["out"].OutPath != rs[2].Outputs["out"].OutPath {
		t.Errorf("resolved to %s", rs2[0].Outputs["out"].OutPath)
	}
	if n := bt.runner.count("user"); n != 1 {
		t.Errorf("user ran %d times", n)
	}
	rs2, _ = bt.paths(nixproto.BuildNormal, all(user2))
	wantStatus(t, &rs2[0].BuildResult, nixproto.AlreadyValid)

	rs2, _ = bt.paths(nixproto.BuildNormal, all(laterPath))
	wantStatus(t, &rs2[0].BuildResult, nixproto.Built)
	out := rs2[0].Outputs["out"].OutPath
	if got := bt.info(out); got.CA != "" || len(got.References) != 1 {
		t.Errorf("later: %+v", got)
	}
	m, err = bt.OutputMap(t.Context(), bt.session, laterPath)
	if err != nil || m["out"] != out {
		t.Errorf("output map of later: %v, %v", m, err)
	}
	hash := rs2[0].Outputs["out"].DrvHash
	real, err := bt.st.Realisation(t.Context(), bt.account.ID, hash, "out")
	if err != nil || real.OutPath != out {
		t.Fatalf("realisation %+v, %v", real, err)
	}
	public, err := nixproto.ParsePublicKey(bt.account.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if signers, err := real.CheckSignatures([]nixproto.PublicKey{public}); err != nil || len(signers) != 1 {
		t.Errorf("signatures of the realisation: %v, %v", signers, err)
	}
}

func TestGraphOutputMap(t *testing.T) {
	bt := newBuildTest(t, nil)
	d := drv("x", "out", "dev")
	path := bt.addDrv(d)
	bt.flush()
	m, err := bt.OutputMap(t.Context(), bt.session, path)
	want := map[string]nixproto.StorePath{"out": d.Outputs["out"].Path, "dev": d.Outputs["dev"].Path}
	if diff := cmp.Diff(want, m); err != nil || diff != "" {
		t.Errorf("%v: %s", err, diff)
	}
	if _, err := bt.OutputMap(t.Context(), bt.session, path[:43]+"-y.drv"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("unknown derivation: %v", err)
	}
}
