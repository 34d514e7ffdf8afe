package server

import (
	"cmp"

	"nbd/nixproto"
	"nbd/server/settings"
	"nbd/store"
)

// A policy is what the settings that apply to one request say of its build.
type policy struct {
	limits Limits
	// failures and timeouts may be answered by earlier ones.
	failures, timeouts bool
	// reuse says whose ends may stand in for a run; share, whether this one may
	// stand in for others'.
	reuse settings.Reuse
	share bool
	// keep lets the build go on when its client is gone.
	keep bool
	// restarts is how often a transient end is tried again.
	restarts int

	// What a guest has at first if nothing is known of its package, and at most.
	cpus, maxCPUs           int
	memoryMiB, maxMemoryMiB int

	// maxRunning bounds the builds of the account that are under way; 0 is no
	// bound. monthly is the CPU time of a month, in hours; nil is no bound.
	maxRunning int
	monthly    *float64

	// reach are the addresses beside public ones that a fixed output may be
	// fetched from.
	reach []string

	tags map[string]string
}

// policy returns what applies to the build of drv, which may be nil, in a
// session. Its error is for the client.
func (b *Builds) policy(s *Session, drv *nixproto.Derivation, sent Limits) (policy, error) {
	e, err := s.settingsFor(drv, sent)
	if err != nil {
		return policy{}, err
	}
	return b.policyOf(&e), nil
}

// policyOf brings settings within what the machine allows.
func (b *Builds) policyOf(e *settings.Effective) policy {
	p := policy{
		limits:     limitsOf(e),
		failures:   e.ReuseBuildFailures,
		timeouts:   e.ReuseBuildTimeouts,
		reuse:      e.ReuseResults,
		share:      e.ShareResults,
		keep:       e.KeepBuildsRunning,
		restarts:   e.MaxBuildRestarts,
		maxRunning: e.MaxRunningBuilds,
		monthly:    e.MaxCPUHoursPerMonth,
		tags:       e.Tags,
		reach:      e.AllowAddresses,
	}
	top := b.cfg.Limits
	p.limits = Limits{
		Timeout:    atMost(top.Timeout, p.limits.Timeout),
		MaxSilent:  atMost(top.MaxSilent, p.limits.MaxSilent),
		MaxLogSize: atMost(top.MaxLogSize, p.limits.MaxLogSize),
	}
	p.restarts = max(0, min(p.restarts, cmp.Or(b.cfg.Retries, mostRestarts)))
	cpus := 0 // what the settings say
	if e.Origin("default-cpu").Level == settings.Default {
		cpus = b.cfg.CPUs
	}
	p.cpus = max(1, min(e.CPUs(cpus), b.cfg.Room.CPUs))
	p.maxCPUs = max(p.cpus, min(b.cfg.MachineCPUs, b.cfg.Room.CPUs))
	if e.MaxCPU > 0 {
		p.maxCPUs = max(p.cpus, min(p.maxCPUs, e.MaxCPU))
	}
	p.maxMemoryMiB = b.cfg.MaxMemoryMiB
	if e.MaxMem > 0 {
		p.maxMemoryMiB = min(p.maxMemoryMiB, e.MaxMem)
	}
	p.memoryMiB = min(e.Memory(b.cfg.MemoryMiB), p.maxMemoryMiB)
	return p
}

// own says that only the account's own ends and builds count.
func (p *policy) own() bool { return !p.share || p.reuse == settings.ReuseOwn }

// scope is that of flights: everybody's who shares and uses what others share,
// else the account's.
func (p *policy) scope(a store.AccountID) uint64 {
	if p.own() {
		return uint64(a)
	}
	return 0
}

// storedFor says under what the end of a run is stored.
func (p *policy) storedFor(a store.AccountID) (shared bool, own store.AccountID) {
	if p.own() {
		own = a
	}
	return p.share, own
}

// shares reports whether an account lets others use its ends now. One that was
// removed does not.
func (s *Session) shares(a store.AccountID) bool {
	if s.book == nil {
		return true
	}
	return s.book.exists(a) && s.book.account(a).ShareResults
}

// usable returns what reports whether the ends of an account may answer others
// than that account, or a itself. Those that may not give way to newer ones: else
// who builds first and does not share then would keep others from sharing.
func (s *Session) usable(a store.AccountID) func(store.AccountID) bool {
	return func(b store.AccountID) bool { return a == b || s.shares(b) }
}

// mostRestarts is how often a transient end is tried again at most, where the
// operator does not say how often: it is free of charge.
const mostRestarts = 20
