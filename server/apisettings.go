package server

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"nbd/server/settings"
	"nbd/store"
)

// settingsCommands show and change settings.
func settingsCommands() []apiCommand {
	return []apiCommand{{
		name: "settings", args: "[NAME] [MORE…]", run: runSettings, text: printSettings, complete: completeSetting,
		flags: []apiFlag{
			{"--show", "", "show the value"},
			{"--set", "V", "set it; a list has commas or spaces, also as further words"},
			{"--add", "V", "add to a list"},
			{"--remove", "V", "remove from a list"},
			{"--reset", "", "go back to the default"},
			{"--ssh-key", "K", "that of one SSH key, by its fingerprint, not of the account"},
		},
		help: "show or change settings",
		more: "Showing needs the permission account:read, changing account:write.\n\n" + settings.Help(),
	}}
}

// signingKeySetting shows a key where others show their value.
const signingKeySetting = "signing-key-for-builds"

// An apiSettings are settings by their names in JSON, in camelCase, with
// "origins" beside them. Its text has the names that people use.
type apiSettings struct {
	effective settings.Effective
	list      []settings.Setting
	one       bool // it was asked for by name
	changed   bool
}

// MarshalJSON implements json.Marshaler.
func (s apiSettings) MarshalJSON() ([]byte, error) {
	object, origins := map[string]any{}, map[string]string{}
	for i := range s.list {
		name := s.list[i].JSONName()
		object[name] = s.effective.JSON(&s.list[i])
		origin := s.effective.Origin(s.list[i].Name)
		origins[name] = origin.String()
	}
	object["origins"] = origins
	return apiJSON(object)
}

func runSettings(ctx context.Context, c *apiCall) (any, error) {
	change, err := c.settingsChange()
	if err != nil {
		return nil, err
	}
	if len(c.args) == 0 {
		if change.Op != 0 {
			return nil, usagef("name the setting to change: settings NAME …")
		}
		return c.showSettings(ctx, settings.All())
	}
	setting, ok := settings.Lookup(c.args[0])
	if !ok {
		return nil, usagef("there is no setting %q; `settings` lists all", clip(c.args[0]))
	}
	if more := c.args[1:]; len(more) > 0 { // ssh joins words, and quotes are gone
		if change.Op == 0 || change.Op == settings.Reset {
			return nil, usagef("%q is one word too many; usage: settings NAME --set V", clip(more[0]))
		}
		change.Value = strings.Join(append([]string{change.Value}, more...), " ")
	}
	if change.Op == 0 {
		if setting.Name == signingKeySetting && !c.has("--ssh-key") {
			return c.signingKey(), nil
		}
		v, err := c.showSettings(ctx, []settings.Setting{*setting})
		v.one = true
		return v, err
	}
	change.Name = setting.Name
	if err := c.Client.require(AccountWrite); err != nil {
		return nil, err
	}
	o, err := c.settingsOwner(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.server.book.change(ctx, o, change); err != nil {
		return nil, err
	}
	e, err := c.effectiveSettings(o)
	return apiSettings{effective: e, list: []settings.Setting{*setting}, one: true, changed: true}, err
}

// settingsChange returns the change that the flags ask for; its Op is 0 for
// none.
func (c *apiCall) settingsChange() (change settings.Change, err error) {
	n := 0
	if c.has("--show") {
		n++
	}
	for name, op := range settingOps {
		for _, v := range c.flags["--"+name] {
			change.Op, change.Value = op, v
			n++
		}
	}
	if n > 1 {
		return change, usagef("give one of --show, --set, --add, --remove and --reset, and once")
	}
	return change, nil
}

// settingsOwner is whose settings the call is about.
func (c *apiCall) settingsOwner(ctx context.Context) (store.SettingsOwner, error) {
	o := store.SettingsOwner{Account: c.account()}
	name, ok := c.flag("--ssh-key")
	if !ok {
		return o, nil
	}
	key, err := c.ownKey(ctx, name)
	o.Key = key.Fingerprint
	return o, err
}

// effectiveSettings returns what counts now: for this session, or, of a key
// that was named, for its sessions.
func (c *apiCall) effectiveSettings(o store.SettingsOwner) (settings.Effective, error) {
	if o.Key == "" {
		return c.currentSettings()
	}
	return c.server.book.client(o.Account, o.Key), nil
}

func (c *apiCall) showSettings(ctx context.Context, list []settings.Setting) (apiSettings, error) {
	if err := c.Client.require(AccountRead); err != nil {
		return apiSettings{}, err
	}
	o, err := c.settingsOwner(ctx)
	if err != nil {
		return apiSettings{}, err
	}
	e, err := c.effectiveSettings(o)
	return apiSettings{effective: e, list: list}, err
}

// printSettings writes one value, or a table of all. A change that was made
// needs no words.
func printSettings(w io.Writer, v any) error {
	if key, ok := v.(apiSigningKey); ok {
		return printSigningKey(w, key)
	}
	s := v.(apiSettings)
	if s.changed {
		return nil
	}
	if s.one {
		_, err := io.WriteString(w, s.effective.Show(&s.list[0])+"\n")
		return err
	}
	for i := range s.list {
		origin := s.effective.Origin(s.list[i].Name)
		value := s.effective.Show(&s.list[i])
		if value == "" {
			value = "-"
		}
		if _, err := fmt.Fprintf(w, "%-24s %s  (%s)\n", s.list[i].Name, value, origin.String()); err != nil {
			return err
		}
	}
	return nil
}

// completeSetting completes the name of a setting.
func completeSetting(context.Context, *apiCall, []string) (names []string) {
	for _, s := range settings.All() {
		names = append(names, s.Name)
	}
	return names
}

// monthlyLimit is how many hours of CPU time the account has in a month; nil
// for no limit.
func (c *apiCall) monthlyLimit() *float64 {
	e := c.server.book.account(c.account())
	return e.MaxCPUHoursPerMonth
}

// defaultPermissions are those of a key or token that is added without any
// being named: what the settings say, and no more than who adds it has.
func (c *apiCall) defaultPermissions() []string {
	e := c.server.book.account(c.account())
	return slices.DeleteFunc(slices.Clone(e.DefaultPermissions), func(p string) bool { return !c.Client.Can(Permission(p)) })
}

// permissions reads --permissions. Nobody can give what he does not have.
func (c *apiCall) permissions() ([]string, error) {
	text, ok := c.flag("--permissions")
	if !ok {
		return c.defaultPermissions(), nil
	}
	list, err := settings.ParsePermissions(text)
	if err != nil {
		return nil, usagef("--permissions %v", err)
	}
	for _, p := range list {
		if !c.Client.Can(Permission(p)) {
			return nil, refusef("permission denied: %s cannot be given by who does not have it", p)
		}
	}
	if list == nil {
		list = []string{}
	}
	return list, nil
}

// joined shows a list in one line.
func joined(list []string) string {
	if len(list) == 0 {
		return "-"
	}
	return strings.Join(list, ",")
}
