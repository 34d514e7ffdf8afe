// Package settings is what accounts and operators can choose: one table of all
// settings (table.go), their values as text and as Go values (value.go), where
// they come from (source.go), and which of several levels counts (this file).
// It is pure: it reads no file and knows no account.
//
// # Levels
//
// A setting may be set on several levels, of which a later one wins:
//
//	default ─ system ─ account ─ key ─ environment ─ derivation ─ client
//
// What the system sets for a limit is a ceiling, too: a level below it can ask
// for less, not for more. Who may set what, and where, is in the table: what is
// the operator's alone, what is the account's as a whole, what a session's
// environment or a derivation may say by itself, and what these may say only if
// the key or token that came may change the account (account:write).
//
// A value that an operator or account stored was checked when it was stored. One
// that cannot be read later is passed over with a note; one in an environment or
// a derivation is an error that names the variable.
package settings

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"nbd/nixproto"
)

// A Level is where a setting was set. Later levels win.
type Level uint8

// The levels.
const (
	Default     Level = iota
	System            // the operator's configuration, `nbd admin settings`
	Account           // of all sessions of an account
	Key               // of one SSH key of an account
	Environment       // of one SSH session
	Derivation        // attributes of what is built
	Client            // what a Nix client sends with a request
)

// String names the level as users see it.
func (l Level) String() string {
	names := [...]string{"default", "system", "account", "key", "environment", "derivation", "client"}
	if int(l) < len(names) {
		return names[l]
	}
	return fmt.Sprintf("level %d", uint8(l))
}

// An Origin says where the value of a setting is from.
type Origin struct {
	Level Level
	// Variable is how it was spelled in an environment or a derivation, "" on
	// other levels.
	Variable string
	// Capped says that the level asked for more than the system allows, so that
	// the value is the system's.
	Capped bool
}

// String tells the origin to a user.
func (o Origin) String() string {
	s := o.Level.String()
	if o.Variable != "" {
		s += " (" + o.Variable + ")"
	}
	if o.Capped {
		s += ", as far as the system allows"
	}
	return s
}

// An Effective holds a value for every setting, as it counts for one account,
// session or build. Its zero value is not of use; see Defaults. It is a value:
// copies do not change each other, as long as lists are not written to.
type Effective struct {
	// ReuseBuildFailures and ReuseBuildTimeouts let earlier ends stand in for a
	// build; ReuseResults says whose.
	ReuseBuildFailures bool
	ReuseBuildTimeouts bool
	ReuseResults       Reuse
	// KeepBuildsRunning lets a build go on when its last client is gone.
	KeepBuildsRunning bool

	Timeout       time.Duration // 0 is none
	MaxSilentTime time.Duration // 0 is none
	MaxLogSize    int64         // bytes, 0 is none
	// MaxCPUHoursPerMonth is nil for none; 0 means that nothing is run.
	MaxCPUHoursPerMonth *float64

	// DefaultCPU, MinCPU and MaxCPU are vCPUs of a guest; 0 of the last two is
	// none. CPUs combines them.
	DefaultCPU, MinCPU, MaxCPU int
	// MinMem and MaxMem are MiB of a guest, 0 is none. Memory combines them.
	MinMem, MaxMem int
	// MaxBuildRestarts is how often a transient end is tried again.
	MaxBuildRestarts int

	// Substituters are the caches that the server fetches from, best first, and
	// TrustedPublicKeys those whose signatures count.
	Substituters      []URL
	TrustedPublicKeys []nixproto.PublicKey
	AlwaysSubstitute  bool
	NeverSubstitute   bool
	// Caches are where results go.
	Caches       []URL
	AccessTokens []AccessToken

	// AllowAddresses are what is reached beside public addresses, for caches that
	// the account names and by its builds of fixed outputs (egress.ParseRule).
	AllowAddresses []string

	MaxStorage       int64 // bytes, 0 is none
	MaxRunningBuilds int   // 0 is none
	MaxConnections   int   // 0 is none

	// SigningKeyForBuilds is the name of one of the account's own keys; "" means
	// the one made with the account.
	SigningKeyForBuilds string
	// TrustedAccounts are names of accounts, which may not exist. One side's
	// wish gives nothing.
	TrustedAccounts []string
	// OfferSigned are names of keys, or whole public keys ("name:base64").
	OfferSigned  []string
	ShareResults bool
	PublicCache  bool
	OIDCSubjects []OIDCSubject

	SettingsFromSSHEnv bool
	SettingsFromDrvEnv bool
	// DefaultPermissions are those of a key or token that is added without any
	// being named.
	DefaultPermissions []string

	// Tags are what NBD_TAG_… variables say. Nil if there are none; not to be
	// written to.
	Tags map[string]string
	// Notes say what was passed over, for the server's log. They hold names and
	// no values.
	Notes []string

	level   Level
	origins []Origin   // by index in the table; shared by copies, not written to
	ceiling *Effective // what the system says; nil before
}

// A Layer is what one level says.
type Layer struct {
	Level Level
	// Values are texts by the names of settings.
	Values map[string]string
	// Variables are how the names were spelled, where that differs.
	Variables map[string]string
	// Tags by name.
	Tags map[string]string
	// Unknown are variables that name no setting.
	Unknown []string
	// AccountWrite says that who sent an environment or derivation may change
	// the account's settings, too.
	AccountWrite bool
}

// Defaults returns the values of the table.
func Defaults() Effective {
	e := Effective{origins: make([]Origin, len(table))}
	for _, s := range table {
		if s.Default == "" {
			continue
		}
		if err := s.value.set(&e, s.Default); err != nil {
			panic("settings: default of " + s.Name + ": " + err.Error()) // the table is wrong
		}
	}
	return e
}

// IsZero reports whether e is no result of Defaults.
func (e *Effective) IsZero() bool { return e.origins == nil }

// With returns e with another level on top; levels come in their order. Its
// error is an *Error about a variable of an environment or a derivation.
func (e Effective) With(l Layer) (Effective, error) {
	if e.IsZero() {
		e = Defaults()
	}
	if l.Level > System && e.ceiling == nil {
		top := e
		e.ceiling = &top
	}
	e.level = l.Level
	e.origins = slices.Clone(e.origins)
	e.Notes = slices.Clip(e.Notes)
	for _, name := range slices.Sorted(maps.Keys(l.Values)) {
		if err := e.set(&l, name); err != nil {
			if l.Level == Environment || l.Level == Derivation {
				return Effective{}, err
			}
			e.Notes = append(e.Notes, fmt.Sprintf("%s of the %s is passed over: %v", name, l.Level, err))
		}
	}
	for _, v := range l.Unknown {
		e.Notes = append(e.Notes, fmt.Sprintf("%s names no setting", v))
	}
	if len(l.Tags) > 0 {
		tags := maps.Clone(e.Tags)
		if tags == nil {
			tags = make(map[string]string, len(l.Tags))
		}
		maps.Copy(tags, l.Tags)
		e.Tags = tags
	}
	return e, nil
}

// set sets one setting to what a level says.
func (e *Effective) set(l *Layer, name string) error {
	s, ok := Lookup(name)
	if !ok {
		return fmt.Errorf("there is no setting %q", name)
	}
	spelled := l.Variables[name]
	if err := s.allowed(l.Level, l.AccountWrite); err != nil {
		return &Error{Setting: name, Variable: spelled, Err: err}
	}
	text := l.Values[name]
	if l.Level > Account {
		if err := s.checkRemote(text); err != nil {
			return &Error{Setting: name, Variable: spelled, Err: err}
		}
	}
	if err := s.value.set(e, text); err != nil {
		return &Error{Setting: name, Variable: spelled, Err: err}
	}
	at := Origin{Level: l.Level, Variable: spelled}
	if e.ceiling != nil && e.ceiling.origins[s.index].Level == System {
		at.Capped = s.value.clamp(e, e.ceiling)
	}
	if urls, ok := s.value.(list[URL]); ok && e.ceiling != nil {
		keepLocal(urls.at(e), *urls.at(e.ceiling))
	}
	e.origins[s.index] = at
	return nil
}

// keepLocal puts the paths of the host that the system lists before the caches
// of an account: these are the operator's, who alone can name such.
func keepLocal(list *[]URL, system []URL) {
	var local []URL
	for _, u := range system {
		if u.Local() && !slices.Contains(*list, u) {
			local = append(local, u)
		}
	}
	*list = append(local, *list...)
}

// Sent is what a Nix client says with a request; zero fields are not set.
type Sent struct {
	Timeout, MaxSilentTime time.Duration
	MaxLogSize             int64 // bytes
}

// WithSent returns e with what the client sent on top.
func (e Effective) WithSent(sent Sent) Effective {
	l := Layer{Level: Client, Values: map[string]string{}}
	add := func(name string, n int64) {
		if n > 0 {
			l.Values[name] = fmt.Sprint(n)
		}
	}
	add("timeout", int64(sent.Timeout/time.Second))
	add("max-silent-time", int64(sent.MaxSilentTime/time.Second))
	add("max-log-size", sent.MaxLogSize)
	e, _ = e.With(l) // numbers, which are always values of these
	return e
}

// Origin says where the value of a setting is from; that of an unknown name is
// the default.
func (e *Effective) Origin(name string) Origin {
	s, ok := Lookup(name)
	if !ok || e.origins == nil {
		return Origin{}
	}
	return e.origins[s.index]
}

// CPUs returns the vCPUs for a guest that wants n, 0 for no wish.
func (e *Effective) CPUs(n int) int {
	if n <= 0 {
		n = e.DefaultCPU
	}
	n = max(n, e.MinCPU)
	if e.MaxCPU > 0 {
		n = min(n, e.MaxCPU)
	}
	return n
}

// Memory returns the MiB for a guest that wants n.
func (e *Effective) Memory(n int) int {
	n = max(n, e.MinMem)
	if e.MaxMem > 0 {
		n = min(n, e.MaxMem)
	}
	return n
}

// An Error says why a value cannot be.
type Error struct {
	Setting string
	// Variable is how the setting was spelled in an environment or derivation;
	// "" elsewhere.
	Variable string
	Err      error
}

// Error names the variable, or the setting where there is none.
func (e *Error) Error() string {
	if e.Variable == "" {
		return fmt.Sprintf("setting %s %v", e.Setting, e.Err)
	}
	return fmt.Sprintf("%s %v", e.Variable, e.Err)
}

// Unwrap returns the reason.
func (e *Error) Unwrap() error { return e.Err }
