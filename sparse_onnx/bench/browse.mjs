// Uses a package's page in headless Chromium as a person would: node browse.mjs RUNTIME URL REQUEST -> JSON
// REQUEST: width, height, scheme, prompt, length, stop (after so many bytes), keys, shots ({file: selector, '' for the window}).
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [runtime, url, text] = process.argv.slice(2);
const request = { width: 1000, height: 900, scheme: 'light', length: 40, shots: {}, ...JSON.parse(text) };
const { resolve } = createRequire(pathToFileURL(`${runtime}/package.json`).href);
const { default: puppeteer } = await import(pathToFileURL(resolve('puppeteer-core')).href);

const WEBGPU = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-unsafe-swiftshader'];
const browser = await puppeteer.launch({
  executablePath: `${runtime}/files/chromium`, headless: 'shell', pipe: true,
  args: ['--no-sandbox', '--force-color-profile=srgb', ...WEBGPU],
});
const told = { console: [], requests: [] };
try {
  const page = await browser.newPage();
  page.on('console', (message) => told.console.push(`${message.type()}: ${message.text()}`));
  page.on('pageerror', (error) => told.console.push(`error: ${error.message ?? error}`));
  page.on('request', (each) => told.requests.push(each.url()));
  await page.setViewport({ width: request.width, height: request.height });
  await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: request.scheme }]);
  await page.goto(url);
  const settled = () => page.waitForFunction(
    () => document.querySelector('#status.wrong') || !document.querySelector('#generate').matches(':disabled'), { timeout: 240000 });
  await settled();
  told.loaded = await page.$eval('#status', (each) => each.textContent);
  if (request.prompt !== undefined && !(await page.$('#status.wrong'))) {
    await page.$eval('#prompt', (box, value) => { box.value = value; }, request.prompt);
    await page.$eval('#length', (box, value) => { box.value = value; }, request.length);
    await page.focus('#generate');
    await page.keyboard.press('Enter');
    if (request.stop) {
      await page.waitForFunction((rows) => document.querySelectorAll('#rows tr').length >= rows, {},
        new TextEncoder().encode(request.prompt).length + request.stop);
      await page.focus('#stop');
      await page.keyboard.press('Enter');
    }
    await settled();
    told.text = await page.$eval('#text', (each) => each.textContent);
    told.speed = await page.$eval('#speed', (each) => each.textContent);
    told.experts = await page.$$eval('#rows tr', (rows) => rows.map((row) =>
      [...row.querySelectorAll('td')].map((cell) => [...cell.querySelectorAll('.used i')]
        .map((each) => Number(each.style.gridColumnStart) - 1))));
    told.spoken = await page.$$eval('#rows tr', (rows) => rows.map((row) =>
      [row.querySelector('th').getAttribute('aria-label'), ...[...row.querySelectorAll('td .spoken')].map((each) => each.textContent)]));
    if (request.keys) {
      await page.focus('#rows tr');
      for (const key of request.keys) await page.keyboard.press(key);
      told.detail = await page.$eval('#detail', (each) => each.textContent);
    }
  }
  told.overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  told.status = await page.$eval('#status', (each) => each.textContent);
  told.wrong = await page.$eval('#status', (each) => each.classList.contains('wrong'));
  for (const [file, selector] of Object.entries(request.shots)) {
    await (selector ? await page.$(selector) : page).screenshot({ path: file });
  }
} finally {
  await browser.close();
}
console.log(JSON.stringify(told));
