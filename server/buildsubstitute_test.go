package server

import (
	"slices"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/server/settings"
	"nbd/server/upstream"
)

// fetchingBuilds are builds of an account that uses a cache, with some more
// settings set to true.
func fetchingBuilds(t *testing.T, c *fakeCache, more ...string) *buildTest {
	t.Helper()
	client := upstream.New(upstream.Config{})
	t.Cleanup(client.Close)
	bt := newBuildTest(t, func(cfg *BuildsConfig) { cfg.Substituter = NewSubstituter(cfg.Store, client, nil) })
	values := settingsOf(c)
	for _, name := range more {
		values[name] = "true"
	}
	bt.book = newSettingsBook(values, bt.st, bt.session.Log)
	bt.session = bt.newSession(bt.account)
	return bt
}

// outputOf is what a cache has for the output of a derivation.
func outputOf(t *testing.T, d *nixproto.Derivation, refs ...nixproto.StorePath) testPath {
	return made(t, nixproto.PathInfo{Path: d.Outputs["out"].Path, References: refs}, narOf(t, "the cache's "+d.Name))
}

// What a cache has is not built, unless somebody says so.
func TestBuildFetchesOutput(t *testing.T) {
	for name, test := range map[string]struct {
		env      map[string]string
		settings []string
		runs     int
	}{
		"plain":      {nil, nil, 0},
		"disallowed": {map[string]string{"allowSubstitutes": ""}, nil, 1},
		"allowed":    {map[string]string{"allowSubstitutes": "1"}, nil, 0},
		"structured": {map[string]string{"__json": `{"allowSubstitutes":false}`}, nil, 1},
		"always":     {map[string]string{"allowSubstitutes": ""}, []string{"always-substitute"}, 0},
		"never":      {nil, []string{"never-substitute"}, 1},
		"never here": {map[string]string{"NBD_NEVER_SUBSTITUTE": "1"}, []string{"settings-from-drv-env"}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			c := newFakeCache(t)
			bt := fetchingBuilds(t, c, test.settings...)
			d := drv("cached")
			for k, v := range test.env {
				d.Env[k] = v
			}
			req := bt.request(d)
			c.add(t, nil, outputOf(t, d))
			r, sink := bt.build(req)
			if !r.Status.Success() || bt.runner.count("cached") != test.runs {
				t.Errorf("%+v after %d runs, notes %q", r, bt.runner.count("cached"), sink.notes)
			}
			fromCache := bt.content(d.Outputs["out"].Path) == "the cache's cached"
			if fromCache != (test.runs == 0) {
				t.Errorf("from the cache: %v", fromCache)
			}
		})
	}
}

// All outputs are needed of one that has several.
func TestBuildFetchesAllOutputs(t *testing.T) {
	c := newFakeCache(t)
	bt := fetchingBuilds(t, c)
	d := drv("several", "out", "dev")
	req := bt.request(d)
	c.add(t, nil, outputOf(t, d))
	if r, _ := bt.build(req); r.Status != nixproto.Built || bt.runner.count("several") != 1 {
		t.Errorf("%+v", r)
	}
	if got := bt.content(d.Outputs["out"].Path); got != "the cache's several" {
		t.Errorf("what was there already became %q", got)
	}
}

// Inputs that the client did not bring come from the cache, with what they refer
// to, and not if never-substitute is set.
func TestBuildFetchesInputs(t *testing.T) {
	c := newFakeCache(t)
	dep := textPath(t, "dep", "dep")
	input := builtPath(t, "input", "refers to "+string(dep.Path), dep.Path)
	c.add(t, nil, dep, input)
	for _, never := range []bool{false, true} {
		more := []string{}
		if never {
			more = append(more, "never-substitute")
		}
		bt := fetchingBuilds(t, c, more...)
		d := drv("user")
		d.InputSrcs = []nixproto.StorePath{input.Path}
		r, sink := bt.build(bt.request(d))
		if r.Status.Success() == never || bt.runner.count("user") != len(sink.copies)/2 || never && !strings.Contains(r.Error, string(input.Path)) {
			t.Errorf("never %v: %+v, copies %q", never, r, sink.copies)
		}
	}
}

// The operator's credentials are for the caches that he named.
func TestTokensOfOperator(t *testing.T) {
	bt := newBuildTest(t, nil)
	own := settings.AccessToken{Host: "own.example", Token: "a"}
	his := settings.AccessToken{Host: "his.example", Token: "b"}
	y := &survey{s: bt.session, noted: map[string]bool{}}
	mine, all := y.tokens(&settings.Effective{AccessTokens: []settings.AccessToken{his, own}}, &settings.Effective{AccessTokens: []settings.AccessToken{his}})
	for url, want := range map[string][2]bool{"https://own.example": {true, true}, "https://his.example": {false, true}} {
		src, err := upstream.ParseSource(url, false)
		if err != nil {
			t.Fatal(err)
		}
		client := upstream.New(upstream.Config{})
		defer client.Close()
		bare := client.Cache(src, upstream.Tokens{}).ID()
		if got := [2]bool{client.Cache(src, mine).ID() != bare, client.Cache(src, all).ID() != bare}; got != want {
			t.Errorf("%s: credentials %v, want %v", url, got, want)
		}
	}
}

// What is fetched counts for max-storage, and is not fetched past it.
func TestFetchWithinStorage(t *testing.T) {
	c := newFakeCache(t)
	bt := fetchingBuilds(t, c)
	small, large := builtPath(t, "small", "small"), builtPath(t, "large", strings.Repeat("large", 1<<16))
	c.add(t, nil, small, large)
	values := settingsOf(c)
	values["max-storage"] = "100000"
	bt.book = newSettingsBook(values, bt.st, bt.session.Log)
	s := bt.newSession(bt.account)
	sink := newFakeSink()
	have, err := bt.cfg.Substituter.Ensure(t.Context(), s, pathsOf([]testPath{large, small}), sink)
	if err != nil || !slices.Equal(have, []nixproto.StorePath{small.Path}) {
		t.Errorf("have %v, %v", have, err)
	}
	if len(sink.notes) != 1 || !strings.Contains(sink.notes[0], "max-storage") || c.count() != 1 {
		t.Errorf("notes %q", sink.notes)
	}
}

// A graph is built only as far as caches do not have it; asking says the same
// and fetches nothing.
func TestGraphFetches(t *testing.T) {
	c := newFakeCache(t)
	bt := fetchingBuilds(t, c)
	chain := bt.chain("c", 5)
	bottom, middle := bt.drvFiles[chain[0]], bt.drvFiles[chain[2]]
	c.add(t, nil, outputOf(t, bottom), outputOf(t, middle, bottom.Outputs["out"].Path))
	opaque := builtPath(t, "opaque", "opaque")
	c.add(t, nil, opaque)
	absent := builtPath(t, "absent", "").Path
	m := bt.missing(all(chain[4]), nixproto.DerivedPath{Path: opaque.Path}, nixproto.DerivedPath{Path: absent})
	build := slices.Sorted(slices.Values(chain[3:]))
	fetch := slices.Sorted(slices.Values([]nixproto.StorePath{opaque.Path, bottom.Outputs["out"].Path, middle.Outputs["out"].Path}))
	if !slices.Equal(m.WillBuild, build) || !slices.Equal(m.WillSubstitute, fetch) || !slices.Equal(m.Unknown, []nixproto.StorePath{absent}) || m.NarSize == 0 {
		t.Errorf("missing %+v", m)
	}
	if c.count() > 0 {
		t.Error("asking fetched something")
	}
	rs, sink := bt.paths(nixproto.BuildNormal, all(chain[4]), nixproto.DerivedPath{Path: opaque.Path}, nixproto.DerivedPath{Path: absent})
	wantStatus(t, &rs[0].BuildResult, nixproto.Built)
	wantStatus(t, &rs[1].BuildResult, nixproto.AlreadyValid)
	wantStatus(t, &rs[2].BuildResult, nixproto.NoSubstituters)
	for i, runs := range []int{0, 0, 0, 1, 1} {
		if name := bt.drvFiles[chain[i]].Name; bt.runner.count(name) != runs {
			t.Errorf("%s ran %d times", name, bt.runner.count(name))
		}
	}
	if len(sink.copies) != 3 || c.count() != 3 {
		t.Errorf("copies %q", sink.copies)
	}
}

// A check runs, whatever caches have.
func TestCheckFetchesNothing(t *testing.T) {
	c := newFakeCache(t)
	bt := fetchingBuilds(t, c)
	d := drv("checked")
	path := bt.addDrv(d)
	rs, _ := bt.paths(nixproto.BuildNormal, all(path))
	wantStatus(t, &rs[0].BuildResult, nixproto.Built)
	c.add(t, nil, outputOf(t, d))
	rs, _ = bt.paths(nixproto.BuildCheck, all(path))
	if !rs[0].Status.Success() || bt.runner.count("checked") != 2 || c.count() > 0 {
		t.Errorf("%+v after %d runs", rs[0], bt.runner.count("checked"))
	}
}
