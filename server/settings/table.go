package settings

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"nbd/nixproto"
)

// A Scope says who may set a setting, and where.
type Scope uint8

// The scopes.
const (
	// Open: by the account and its keys, and by any session's environment or
	// derivation.
	Open Scope = iota
	// Guarded: by the account and its keys; by environment and derivation only
	// with account:write.
	Guarded
	// AccountOnly: by the account as a whole.
	AccountOnly
	// OperatorOnly: by the operator, for all accounts or for one.
	OperatorOnly
)

// String says who may set it.
func (s Scope) String() string {
	return [...]string{
		"anywhere", "account, key; environment and derivation with account:write", "account only", "operator only, per account",
	}[s]
}

// A Setting is one row of the table.
type Setting struct {
	Name    string
	Default string // as text; "" is none, or what Usage says
	Scope   Scope
	Usage   string
	// PerAccount: it makes no sense for all accounts, so the system cannot set
	// it.
	PerAccount bool

	index int
	value value
}

// A value is the type of a setting and its place in an Effective.
type value interface {
	set(e *Effective, text string) error
	// clamp lowers the value to that of top, and reports whether it did.
	clamp(e, top *Effective) bool
	// show returns the value without secrets; json as JSON has it.
	show(e *Effective) string
	json(e *Effective) any
	// raw returns the text that set reads, with secrets.
	raw(e *Effective) string
	isList() bool
	isFlag() bool // a boolean
}

// A field is a value of type T.
type field[T any] struct {
	at    func(*Effective) *T
	parse func(string) (T, error)
	text  func(T) string
	less  func(T, T) bool // nil if a system's value is no ceiling
}

func (f field[T]) set(e *Effective, text string) error {
	v, err := f.parse(text)
	if err == nil {
		*f.at(e) = v
	}
	return err
}

func (f field[T]) clamp(e, top *Effective) bool {
	if f.less == nil || !f.less(*f.at(top), *f.at(e)) {
		return false
	}
	*f.at(e) = *f.at(top)
	return true
}

func (f field[T]) show(e *Effective) string { return f.text(*f.at(e)) }
func (f field[T]) raw(e *Effective) string  { return f.text(*f.at(e)) }
func (f field[T]) isList() bool             { return false }
func (f field[T]) isFlag() bool             { _, ok := any(*new(T)).(bool); return ok }

// json returns what JSON has for the value; limits in seconds.
func (f field[T]) json(e *Effective) any {
	if d, ok := any(*f.at(e)).(time.Duration); ok {
		return int64(d / time.Second)
	}
	return *f.at(e)
}

// A list is a value that is a list of T.
type list[T any] struct {
	field[[]T]
}

func (l list[T]) isList() bool { return true }

func (l list[T]) json(e *Effective) any {
	texts := []string{}
	for _, v := range *l.at(e) {
		texts = append(texts, itemText(v))
	}
	return texts
}

func (l list[T]) raw(e *Effective) string {
	var texts []string
	for _, v := range *l.at(e) {
		texts = append(texts, rawItem(v))
	}
	return strings.Join(texts, " ")
}

// rawItem returns an item as it was set.
func rawItem(v any) string {
	switch v := v.(type) {
	case URL:
		return v.Raw()
	case AccessToken:
		return v.Host + "=" + v.Token.Reveal()
	}
	return fmt.Sprint(v)
}

// itemText returns an item without secrets.
func itemText[T any](v T) string {
	if t, ok := any(v).(AccessToken); ok {
		return t.Host + "=" + hidden
	}
	return fmt.Sprint(v)
}

func boolean(at func(*Effective) *bool) value {
	return field[bool]{at, parseBool, strconv.FormatBool, nil}
}

func seconds(at func(*Effective) *time.Duration) value {
	text := func(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) }
	return field[time.Duration]{at, parseSeconds, text, tighter[time.Duration]}
}

func size(at func(*Effective) *int64, less func(a, b int64) bool) value {
	return field[int64]{at, parseBytes, func(n int64) string { return strconv.FormatInt(n, 10) }, less}
}

func count(things string, at func(*Effective) *int, less func(a, b int) bool) value {
	return field[int]{at, parseCount(things, 1<<30), strconv.Itoa, less}
}

func hours(at func(*Effective) **float64) value {
	text := func(h *float64) string {
		if h == nil {
			return ""
		}
		return strconv.FormatFloat(*h, 'f', -1, 64)
	}
	less := func(a, b *float64) bool { return a != nil && (b == nil || *a < *b) }
	return field[*float64]{at, parseHours, text, less}
}

func items[T any](at func(*Effective) *[]T, parse func(string) (T, error)) value {
	text := func(all []T) string {
		texts := make([]string, len(all))
		for i, v := range all {
			texts[i] = itemText(v)
		}
		return strings.Join(texts, " ")
	}
	return list[T]{field[[]T]{at, parseList(parse), text, nil}}
}

// tighter orders limits of which 0 is none.
func tighter[T int | int64 | time.Duration](a, b T) bool { return a > 0 && (b <= 0 || a < b) }

// fewer orders numbers of which 0 is none.
func fewer(a, b int) bool { return a < b }

// Defaults that are more than a word.
const (
	defaultSubstituter = "https://cache.nixos.org"
	defaultPublicKey   = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
	defaultPermissions = "build:read build:write store:read store:write account:read"
)

// table holds all settings. A line of the README and of `settings --help` is
// made of each.
var table = []Setting{
	{Name: "reuse-build-failures", Default: "true", Usage: "serve an earlier permanent failure of the identical build",
		value: boolean(func(e *Effective) *bool { return &e.ReuseBuildFailures })},
	{Name: "reuse-build-timeouts", Default: "false", Usage: "serve an earlier timed-out run that ran longer than the limit that applies now",
		value: boolean(func(e *Effective) *bool { return &e.ReuseBuildTimeouts })},
	{Name: "keep-builds-running", Default: "false", Usage: "a build goes on when its last client is gone",
		value: boolean(func(e *Effective) *bool { return &e.KeepBuildsRunning })},
	{Name: "timeout", Default: "0", Usage: "seconds that a build may run; 0 for no limit",
		value: seconds(func(e *Effective) *time.Duration { return &e.Timeout })},
	{Name: "max-silent-time", Default: "0", Usage: "seconds that a build may print nothing; 0 for no limit",
		value: seconds(func(e *Effective) *time.Duration { return &e.MaxSilentTime })},
	{Name: "max-log-size", Default: "0", Usage: "bytes that a build may print; 0 for no limit (default: the operator's)",
		value: size(func(e *Effective) *int64 { return &e.MaxLogSize }, tighter[int64])},
	{Name: "max-cpu-hours-per-month", Scope: AccountOnly, Usage: "CPU time of runs in a calendar month (UTC), past which none begins; 0 for none at all (default: no limit)",
		value: hours(func(e *Effective) **float64 { return &e.MaxCPUHoursPerMonth })},
	{Name: "default-cpu", Default: "2", Usage: "CPUs of a guest of which nothing is known",
		value: count("CPUs", func(e *Effective) *int { return &e.DefaultCPU }, nil)},
	{Name: "min-cpu", Default: "0", Usage: "CPUs that a guest has at least",
		value: count("CPUs", func(e *Effective) *int { return &e.MinCPU }, nil)},
	{Name: "max-cpu", Default: "0", Usage: "CPUs that a guest has at most; 0 for no limit",
		value: count("CPUs", func(e *Effective) *int { return &e.MaxCPU }, tighter[int])},
	{Name: "min-mem", Default: "0", Usage: "MiB of memory that a guest has at least",
		value: count("MiB", func(e *Effective) *int { return &e.MinMem }, nil)},
	{Name: "max-mem", Default: "0", Usage: "MiB of memory that a guest has at most; 0 for no limit",
		value: count("MiB", func(e *Effective) *int { return &e.MaxMem }, tighter[int])},
	{Name: "max-build-restarts", Default: "3", Usage: "how often a build is run again after a transient end, 20 at most",
		value: count("restarts", func(e *Effective) *int { return &e.MaxBuildRestarts }, fewer)},
	{Name: "substituters", Default: defaultSubstituter, Scope: Guarded, Usage: "caches that the server fetches from, best first",
		value: items(func(e *Effective) *[]URL { return &e.Substituters }, parseURL(schemesRead))},
	{Name: "trusted-public-keys", Default: defaultPublicKey, Scope: Guarded, Usage: "keys whose signatures count",
		value: items(func(e *Effective) *[]nixproto.PublicKey { return &e.TrustedPublicKeys }, parsePublicKey)},
	{Name: "always-substitute", Default: "false", Usage: "look into the caches also when the client does not ask",
		value: boolean(func(e *Effective) *bool { return &e.AlwaysSubstitute })},
	{Name: "never-substitute", Default: "false", Usage: "do not look into the caches even if the client asks",
		value: boolean(func(e *Effective) *bool { return &e.NeverSubstitute })},
	{Name: "caches", Scope: Guarded, Usage: "where results and their closure go after each build: s3://bucket?endpoint=…&region=…, http(s)://…, file://… (operator only)",
		value: items(func(e *Effective) *[]URL { return &e.Caches }, parseURL(schemesWrite))},
	{Name: "access-tokens", Scope: Guarded, Usage: "credentials for caches, HOST=TOKEN or HOST=USER:PASSWORD; never shown again",
		value: items(func(e *Effective) *[]AccessToken { return &e.AccessTokens }, parseAccessToken)},
	{Name: "max-storage", Default: "0", Scope: OperatorOnly, Usage: "bytes that an account may have in the store; 0 for no limit",
		value: size(func(e *Effective) *int64 { return &e.MaxStorage }, nil)},
	{Name: "max-running-builds", Default: "0", Scope: OperatorOnly, Usage: "builds that an account may have running; 0 for no limit",
		value: count("builds", func(e *Effective) *int { return &e.MaxRunningBuilds }, nil)},
	{Name: "max-connections", Default: "0", Scope: OperatorOnly, Usage: "connections that an account may have open; 0 for no limit",
		value: count("connections", func(e *Effective) *int { return &e.MaxConnections }, nil)},
	{Name: "allow-addresses", Scope: OperatorOnly, Usage: "addresses that are not public and that its caches, and builds of fixed outputs, may reach: networks (CIDR), addresses, host[:port]",
		value: items(func(e *Effective) *[]string { return &e.AllowAddresses }, parseAddresses)},
	{Name: "signing-key-for-builds", Scope: Guarded, PerAccount: true, Usage: "name of the account's key that signs what it builds (default: the one made with the account)",
		value: field[string]{func(e *Effective) *string { return &e.SigningKeyForBuilds }, parseOwnKey, func(s string) string { return s }, nil}},
	{Name: "trusted-accounts", Scope: AccountOnly, PerAccount: true, Usage: "accounts that see what this one has, if they name this one, too",
		value: items(func(e *Effective) *[]string { return &e.TrustedAccounts }, parseAccountName)},
	{Name: "offer-signed", Scope: AccountOnly, PerAccount: true, Usage: "names of keys: what this account has signed by one of them may be used by every account that trusts that key",
		value: items(func(e *Effective) *[]string { return &e.OfferSigned }, parseOffer)},
	{Name: "share-results", Default: "true", Scope: AccountOnly, Usage: "share ends and running builds with other accounts; false keeps this account's, and uses no others'",
		value: boolean(func(e *Effective) *bool { return &e.ShareResults })},
	{Name: "reuse-results", Default: "all", Usage: "whose results may stand in for a build: all, own or none",
		value: field[Reuse]{func(e *Effective) *Reuse { return &e.ReuseResults }, parseReuse, func(r Reuse) string { return string(r) }, nil}},
	{Name: "public-cache", Default: "false", Scope: AccountOnly, PerAccount: true, Usage: "publish this account's uploads and builds without credential",
		value: boolean(func(e *Effective) *bool { return &e.PublicCache })},
	{Name: "oidc-subjects", Scope: AccountOnly, PerAccount: true, Usage: "identity tokens that may be exchanged for one of this account: " + oidcForm,
		value: items(func(e *Effective) *[]OIDCSubject { return &e.OIDCSubjects }, parseOIDCSubject)},
	{Name: "settings-from-ssh-env", Default: "true", Scope: Guarded, Usage: "obey NBD_… variables of an SSH session",
		value: boolean(func(e *Effective) *bool { return &e.SettingsFromSSHEnv })},
	{Name: "settings-from-drv-env", Default: "false", Scope: Guarded, Usage: "obey NBD_… attributes of a derivation",
		value: boolean(func(e *Effective) *bool { return &e.SettingsFromDrvEnv })},
	{Name: "default-permissions", Default: defaultPermissions, Scope: Guarded, Usage: "what a key or token may do that is added without saying it",
		value: items(func(e *Effective) *[]string { return &e.DefaultPermissions }, parsePermission)},
}

// parseOwnKey reads a name of a key, or nothing for the first one.
func parseOwnKey(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	return parseKeyName(text)
}

var byName = func() map[string]*Setting {
	m := make(map[string]*Setting, len(table))
	for i := range table {
		table[i].index = i
		m[table[i].Name] = &table[i]
	}
	return m
}()

// All returns all settings in the order of the table.
func All() []Setting { return append([]Setting(nil), table...) }

// Lookup returns the setting of a name.
func Lookup(name string) (*Setting, bool) {
	s, ok := byName[name]
	return s, ok
}

// IsList reports whether items can be added to and removed from the setting.
func (s *Setting) IsList() bool { return s.value.isList() }

// Variable is the setting's name in an environment or a derivation.
func (s *Setting) Variable() string { return prefixes[0] + variableName(s.Name) }

// JSONName is the setting's name in JSON, in camelCase.
func (s *Setting) JSONName() string {
	words := strings.Split(s.Name, "-")
	for i := 1; i < len(words); i++ {
		words[i] = strings.ToUpper(words[i][:1]) + words[i][1:]
	}
	return strings.Join(words, "")
}

// allowed reports why a level cannot set the setting. The error follows its
// name.
func (s *Setting) allowed(l Level, accountWrite bool) error {
	switch {
	case l == System && s.PerAccount:
		return errors.New("is of single accounts and cannot be set for all")
	case l <= Account || l == Client:
		return nil
	case s.Scope == OperatorOnly:
		return fmt.Errorf("cannot be set by %s: %s is the operator's", where(l), s.Name)
	case s.Scope == AccountOnly:
		return fmt.Errorf("cannot be set by %s: %s is of the account as a whole", where(l), s.Name)
	case l > Key && s.Scope == Guarded && !accountWrite:
		return fmt.Errorf("cannot be set by %s: permission denied, account:write is missing", where(l))
	}
	return nil
}

// where names a level in a sentence.
func where(l Level) string {
	return map[Level]string{Key: "a key", Environment: "the environment of a session", Derivation: "a derivation"}[l]
}

// checkRemote refuses paths of the host, which are the operator's alone.
func (s *Setting) checkRemote(text string) error {
	switch s.value.(type) {
	case list[URL]:
		for _, item := range Items(text) {
			if isLocal(item) {
				return errors.New("cannot name a path of the server: file:// is the operator's")
			}
		}
	}
	return nil
}

// isLocal reports whether an item of a list of URLs is a path of the host.
func isLocal(item string) bool { return len(item) >= 5 && strings.EqualFold(item[:5], "file:") }

// Show returns the value of a setting as text, without secrets.
func (e *Effective) Show(s *Setting) string { return s.value.show(e) }

// JSON returns the value of a setting for JSON, without secrets: a boolean, a
// number, a text or a list of texts; nil if it has none.
func (e *Effective) JSON(s *Setting) any { return s.value.json(e) }

// Help is the text of `settings --help`.
func Help() string {
	var b strings.Builder
	for i := range table {
		s := &table[i]
		fmt.Fprintf(&b, "%s\n    %s\n    default: %s; set by: %s\n", s.Name, s.Usage, orNone(s.Default), s.Scope)
	}
	return b.String()
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
