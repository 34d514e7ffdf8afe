package vm

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// testPlatform is a platform that templates can be named for.
func testPlatform(kernel string) *platform {
	return &platform{arch: archX8664, accel: "tcg", boot: &bootFiles{kernelHash: kernel, initrdHash: "i", nestedHash: "n"}}
}

func sized(vcpus, memoryMiB int) machine {
	return machine{arch: archX8664, accel: "tcg", vcpus: vcpus, memoryMiB: memoryMiB, scratchGiB: 1}
}

// A testMaker makes templates of nothing, when it is told to.
type testMaker struct {
	t             *testing.T
	saved         *template     // what load returns
	loads         chan struct{} // load waits for it; nil: it does not wait
	boots         chan error    // boot waits for it
	booted, keeps atomic.Int32
	made          []*template
}

func newTestMaker(t *testing.T) *testMaker {
	return &testMaker{t: t, boots: make(chan error, 10)}
}

func (m *testMaker) maker() templateMaker {
	return templateMaker{
		load: func(string) *template {
			if m.loads != nil {
				<-m.loads
			}
			return m.saved
		},
		boot: func() (*template, error) {
			m.booted.Add(1)
			if err := <-m.boots; err != nil {
				return nil, err
			}
			made := emptyTemplate(m.t)
			m.made = append(m.made, made)
			return made, nil
		},
		keep: func(_ string, t *template) { m.keeps.Add(1); t.release() },
	}
}

// fail has the making of a template fail.
func (m *testMaker) fail(err error) {
	for range templateTries {
		m.boots <- err
	}
}

// ready has a template made and returns a loan of it.
func (m *testMaker) ready(all *templates, p *platform, of machine) *loan {
	m.t.Helper()
	m.boots <- nil
	all.want(p, of, m.maker())
	synctest.Wait()
	l, cold, err := all.take(m.t.Context(), p, of, m.maker())
	if l == nil || cold != nil || err != nil {
		m.t.Fatalf("%v, %v", l, err)
	}
	return l
}

// templatesTest runs a test with a table in which one guest may boot at a time.
func templatesTest(t *testing.T, f func(t *testing.T, all *templates, p *platform, m *testMaker)) {
	synctest.Test(t, func(t *testing.T) {
		all := newTemplates(1<<30, 1)
		m := newTestMaker(t)
		f(t, all, testPlatform("k"), m)
		all.close()
		for _, made := range m.made {
			if !closed(made.ram) || !closed(made.state) || !closed(made.disk) {
				t.Error("a template was not freed")
			}
		}
	})
}

// Of those who need a template that is being made, so many boot from cold, and
// the others wait for it.
func TestTemplateIsMadeOnce(t *testing.T) {
	templatesTest(t, func(t *testing.T, all *templates, p *platform, m *testMaker) {
		one := sized(2, 2560)
		_, cold, err := all.take(t.Context(), p, one, m.maker())
		if cold == nil || err != nil {
			t.Fatalf("the first does not boot: %v", err)
		}
		var cloned atomic.Int32
		for range 5 {
			go func() {
				l, cold, err := all.take(t.Context(), p, one, m.maker())
				if l == nil || cold != nil || err != nil {
					t.Errorf("%v, %v", l, err)
					return
				}
				l.release()
				cloned.Add(1)
			}()
		}
		// Who does not want to wait does not.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if l, cold, err := all.take(ctx, p, one, m.maker()); l != nil || cold != nil || !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		synctest.Wait()
		if cloned.Load() != 0 {
			t.Error("cloned from nothing")
		}
		m.boots <- nil
		synctest.Wait()
		if m.booted.Load() != 1 || m.keeps.Load() != 1 || cloned.Load() != 5 {
			t.Errorf("made %d times, kept %d times, %d cloned", m.booted.Load(), m.keeps.Load(), cloned.Load())
		}
		cold()
		// The turn is free for another now.
		if cold, err := all.boot(t.Context()); err != nil {
			t.Error(err)
		} else {
			cold()
		}
	})
}

// One that lies on the disk is waited for, and not written again.
func TestTemplateIsLoaded(t *testing.T) {
	templatesTest(t, func(t *testing.T, all *templates, p *platform, m *testMaker) {
		m.saved, m.loads = emptyTemplate(t), make(chan struct{})
		got := make(chan *loan)
		go func() {
			l, _, err := all.take(t.Context(), p, sized(2, 2560), m.maker())
			if err != nil {
				t.Error(err)
			}
			got <- l
		}()
		synctest.Wait()
		close(m.loads)
		if l := <-got; l == nil || l.template != m.saved {
			t.Errorf("got %v", l)
		} else {
			l.release()
		}
		synctest.Wait()
		if m.booted.Load() != 0 || m.keeps.Load() != 0 {
			t.Errorf("made %d, kept %d", m.booted.Load(), m.keeps.Load())
		}
	})
}

// An emulator that crashed once is given another chance at once.
func TestTemplateIsTriedAgain(t *testing.T) {
	templatesTest(t, func(t *testing.T, all *templates, p *platform, m *testMaker) {
		m.boots <- errors.New("it crashed")
		m.ready(all, p, sized(2, 2560)).release()
		if _, failures := all.count(); len(failures) != 0 || m.booted.Load() != 2 || m.keeps.Load() != 1 {
			t.Errorf("made %d times, kept %d times, failures %v", m.booted.Load(), m.keeps.Load(), failures)
		}
	})
}

func TestTemplateFailureIsRemembered(t *testing.T) {
	templatesTest(t, func(t *testing.T, all *templates, p *platform, m *testMaker) {
		bad := errors.New("no luck")
		m.fail(bad)
		all.want(p, sized(2, 2560), m.maker())
		synctest.Wait()
		for range 3 {
			l, cold, err := all.take(t.Context(), p, sized(2, 2560), m.maker())
			if l != nil || cold == nil || !errors.Is(err, bad) {
				t.Fatalf("%v, %v", l, err)
			}
			cold()
		}
		if m.booted.Load() != templateTries {
			t.Errorf("tried %d times", m.booted.Load())
		}
		if ready, failures := all.count(); ready != 0 || len(failures) != 1 {
			t.Errorf("%d ready, %v", ready, failures)
		}
		time.Sleep(templateRetry)
		m.ready(all, p, sized(2, 2560)).release()
	})
}

// While the template of its size is made, a build gets a larger one, if that is
// not much larger and for the same kind of guest.
func TestLargerTemplate(t *testing.T) {
	templatesTest(t, func(t *testing.T, all *templates, p *platform, m *testMaker) {
		large, larger := m.ready(all, p, sized(4, 4608)), m.ready(all, p, sized(8, 8704))
		large.release()
		larger.release()
		nested, other := sized(2, 2560), testPlatform("other")
		nested.kvm = true
		for _, tt := range []struct {
			name string
			p    *platform
			m    machine
			want *loan
		}{
			{"the smallest", p, sized(2, 2560), large},
			{"more processors", p, sized(8, 4608), larger},
			{"too many processors", p, sized(16, 4608), nil},
			{"too much memory", p, sized(4, 16896), nil},
			{"much less memory", p, sized(8, 1024), nil},
			{"another kind", p, nested, nil},
			{"another kernel", other, sized(2, 2560), nil},
		} {
			l, cold, err := all.take(t.Context(), tt.p, tt.m, m.maker())
			switch {
			case err != nil || (l == nil) != (tt.want == nil) || (cold == nil) != (tt.want != nil):
				t.Errorf("%s: %v, %v", tt.name, l, err)
			case l != nil && l.template != tt.want.template:
				t.Errorf("%s: another one", tt.name)
			}
			if l != nil {
				l.release()
			} else {
				cold()
			}
			m.fail(errors.New("enough"))
			synctest.Wait()
		}
	})
}

// One that does not work is made anew, once in a while.
func TestTemplateIsDropped(t *testing.T) {
	templatesTest(t, func(t *testing.T, all *templates, p *platform, m *testMaker) {
		one, why := sized(2, 2560), errors.New("it does not work")
		bad, again := m.ready(all, p, one), m.ready(all, p, one)
		if !all.drop(bad, why, m.maker()) || all.drop(again, why, m.maker()) {
			t.Error("not dropped once")
		}
		if closed(bad.ram) {
			t.Error("closed under its users")
		}
		bad.release()
		again.release()
		if !closed(bad.ram) {
			t.Error("not closed after its last use")
		}
		m.boots <- nil // takes the place of what ready put there
		synctest.Wait()
		second, _, err := all.take(t.Context(), p, one, m.maker())
		if err != nil || second == nil || second.template == bad.template {
			t.Fatalf("%v, %v", second, err)
		}
		boots := m.booted.Load()
		all.drop(second, why, m.maker())
		second.release()
		if _, cold, err := all.take(t.Context(), p, one, m.maker()); cold == nil || !errors.Is(err, why) {
			t.Errorf("after the second time: %v", err)
		} else {
			cold()
		}
		if m.booted.Load() != boots {
			t.Error("made again at once")
		}
	})
}

// Those that were not used for the longest time make room.
func TestTemplatesFitIntoMemory(t *testing.T) {
	templatesTest(t, func(t *testing.T, all *templates, p *platform, m *testMaker) {
		write := func(l *loan) {
			if _, err := l.ram.WriteAt([]byte("x"), 0); err != nil {
				t.Fatal(err)
			}
			l.release()
			time.Sleep(time.Second)
		}
		a := m.ready(all, p, sized(1, 2560))
		write(a)
		b := m.ready(all, p, sized(2, 2560))
		write(b)
		all.budget = 4096
		c := m.ready(all, p, sized(4, 2560))
		write(c)
		// c takes nothing while it is put into the table, so one more fits.
		if !closed(a.ram) || closed(b.ram) || closed(c.ram) {
			t.Errorf("closed: %v, %v, %v", closed(a.ram), closed(b.ram), closed(c.ram))
		}
		all.budget = 0
		d := m.ready(all, p, sized(8, 2560))
		d.release()
		if !closed(b.ram) || !closed(c.ram) || closed(d.ram) {
			t.Error("what does not fit is kept, or what is new is not")
		}
	})
}

// What was replaced was in memory, on the disk, or both, and is made anew once.
func TestStaleTemplates(t *testing.T) {
	old, fresh := testPlatform("old"), testPlatform("new")
	r := &Runner{cfg: Config{Logger: slog.New(slog.DiscardHandler)}, templates: newTemplates(1<<30, 1), saved: newSavedTemplates(t.TempDir(), 1<<30)}
	both, memory, disk, nested := sized(1, 2560), sized(2, 2560), sized(4, 2560), sized(8, 2560)
	nested.kvm = true // which guests of the new platform do not have
	for _, m := range []machine{both, memory, nested} {
		id := old.templateID(m)
		r.templates.byID[id] = &templateSlot{id: id, machine: m, p: old, template: emptyTemplate(t)}
	}
	for _, m := range []machine{both, disk, nested} {
		if err := r.saved.save(old.templateID(m), m, filledTemplate(t, m)); err != nil {
			t.Fatal(err)
		}
	}
	var vcpus []int
	for _, m := range r.staleTemplates(fresh) {
		vcpus = append(vcpus, m.vcpus)
	}
	if slices.Sort(vcpus); !slices.Equal(vcpus, []int{1, 2, 4}) {
		t.Errorf("made anew: %v", vcpus)
	}
	if left, err := r.saved.list(); len(left)+len(r.templates.byID) > 0 || err != nil {
		t.Errorf("left: %v, %v, %v", r.templates.byID, left, err)
	}
}

// Templates of a kernel that was replaced go, also the one that is being made.
func TestTemplatesAreReplaced(t *testing.T) {
	templatesTest(t, func(t *testing.T, all *templates, p *platform, m *testMaker) {
		l := m.ready(all, p, sized(2, 2560))
		l.release()
		time.Sleep(time.Second)
		all.want(p, sized(4, 2560), m.maker()) // is being made
		fresh := testPlatform("new")
		stale := all.replace(func(q *platform) bool { return q == fresh })
		if len(stale) != 2 || stale[0].machine != sized(2, 2560) || !closed(l.ram) {
			t.Errorf("%d are stale", len(stale))
		}
		m.boots <- nil
		synctest.Wait()
		if ready, _ := all.count(); ready != 0 || m.keeps.Load() != 1 {
			t.Errorf("%d are ready, %d were kept", ready, m.keeps.Load())
		}
	})
}
